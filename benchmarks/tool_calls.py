"""Calls of tools by SmolLM2, constrained: does each parse and fit its schema, and how often is it the right one?

    python benchmarks/tool_calls.py [--model smollm2-135m] [--adapters base] [--url URL] [--no-save]

A hundred cases of four categories (tool_cases.py) through OpenAI's own client and the HTTP server, eight at once.
A case fails if it has no call, or is cut off, or if one of its calls isn't JSON, names a function that isn't offered,
or doesn't fit the function's schema, by jsonschema; then the status is 1. What the model means is told too: one of 135M
parameters, never trained on calls, means little.
"""

import argparse
import json
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jsonschema
import openai
from tool_cases import FUNCTIONS, ToolCase, tool_cases

MODEL = "smollm2-135m"
MAX_TOKENS = 1600  # sixteen calls, the most of an answer, of the longest arguments that the schemas allow
WORKERS = 8
START_S = 300
CASE_S = 600  # of one case, beside seven others


@contextmanager
def serving(model: str) -> Iterator[str]:
    """A server in a process of its own; yields its address."""
    program = (
        "from loraplex.server.lifecycle import run\n"
        "from loraplex.server.settings import LogSettings, ModelSettings, NetworkSettings, ServeConfig\n"
        f"run(ServeConfig(model=ModelSettings(model={model!r}, served_name='base'), network=NetworkSettings(port=0),\n"
        "    logs=LogSettings(log_requests=False)), on_ready=lambda server: print(server.port, flush=True))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None, "a pipe was asked for"
    try:
        if not select.select([process.stdout], [], [], START_S)[0]:
            raise SystemExit(f"the server isn't ready after {START_S} seconds")
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(60)


def judge(case: ToolCase, message: Any, finish_reason: str) -> dict[str, Any]:
    """What is true of an answer."""
    told: dict[str, Any] = {"category": case.category, "finish_reason": finish_reason, "wrong": []}
    offered = {tool["function"]["name"] for tool in case.tools}
    calls = []
    for call in message.tool_calls or ():
        name, text = call.function.name, call.function.arguments
        try:
            arguments = json.loads(text)
            if name not in offered:
                raise ValueError(f"{name!r} was not offered")
            jsonschema.validate(arguments, FUNCTIONS[name]["function"]["parameters"])
        except (ValueError, jsonschema.ValidationError) as error:
            told["wrong"].append(f"{name}({text}): {error}")
        else:
            calls.append((name, arguments))
    told["num_calls"] = len(calls)
    told["names_right"] = Counter(name for name, _ in calls) == Counter(name for name, _ in case.calls)
    told["all_right"] = len(calls) == len(case.calls) and all(call in calls for call in case.calls)
    return told


def ask(client: openai.OpenAI, name: str, case: ToolCase) -> dict[str, Any]:
    (choice,) = client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": case.question}],
        tools=case.tools,
        temperature=0,
        max_tokens=MAX_TOKENS,
        **case.options,
    ).choices
    return judge(case, choice.message, choice.finish_reason)


def run_cases(url: str, name: str, cases: Sequence[ToolCase]) -> list[dict[str, Any]]:
    """What became of each case, in their order."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=CASE_S)
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda case: ask(client, name, case), cases))


def summary(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By category and in all: cases whose calls are whole, parse and fit, and those that are what was meant."""

    def of(some: Sequence[dict[str, Any]]) -> dict[str, int]:
        return {
            "cases": len(some),
            "calls": sum(one["num_calls"] for one in some),
            "fit": sum(
                one["num_calls"] > 0 and not one["wrong"] and one["finish_reason"] == "tool_calls" for one in some
            ),
            "cut_off": sum(one["finish_reason"] == "length" for one in some),
            "right_functions": sum(one["names_right"] for one in some),
            "right_calls": sum(one["all_right"] for one in some),
        }

    categories = dict.fromkeys(one["category"] for one in told)
    return {"all": of(told)} | {name: of([one for one in told if one["category"] == name]) for name in categories}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--adapters", default="base", help="what the server is asked for")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    from common import save

    cases, began = list(tool_cases())[: options.cases], time.perf_counter()
    if options.url:
        told = run_cases(options.url, options.adapters, cases)
    else:
        with serving(options.model) as url:
            told = run_cases(url, options.adapters, cases)
    results = summary(told)
    print(f"{len(cases)} cases in {time.perf_counter() - began:.0f} s")
    for name, counts in results.items():
        print(f"{name:9} " + ", ".join(f"{what.replace('_', ' ')} {count}" for what, count in counts.items()))
    for one in told:
        for wrong in one["wrong"]:
            print(f"wrong, {one['category']}: {wrong}")
    if not options.no_save:
        save("tool_calls", {"model": options.model, "cases": len(cases), "max_tokens": MAX_TOKENS}, results)
    return 0 if results["all"]["fit"] == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
