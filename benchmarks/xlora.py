"""How fast does a mixture generate, against PEFT's X-LoRA and against rows of the base model?

python benchmarks/xlora.py                    # all questions, some 15 minutes
python benchmarks/xlora.py --questions peft batch

peft      57 prompt tokens and 128 new ones, batch 1, against PEFT's X-LoRA (which has no cache)
long      milliseconds a token at token 50 and at token 500
draft     prompts of the test data, batch 1: drafted, undrafted, and the base model; how many drafts were right
batch     batch 8: all rows through the mixture, one row, none

long, draft and batch run by `model.generate` and by the engine.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from adapters import write_random_adapters
from common import alternate, console, medians, print_table, save
from torch import Tensor

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams, XLoraConfig
from loraplex.models.checkpoints.loading import load_base_model
from loraplex.models.text.prompts import encode_prompts

RANKS = (8, 16, 4, 32)
QUESTIONS = ("peft", "long", "draft", "batch")
MIXTURE = "mixture"


def with_mixture(model_name: str, dtype: str, paths: Mapping[str, Path]) -> MultiLoraModel:
    model = MultiLoraModel.from_pretrained(model_name, dtype=dtype)
    for name, path in paths.items():
        model.load_adapter(name, path)
    model.create_mixture(MIXTURE, list(paths), XLoraConfig(layerwise_scalings=True))
    return model


def peft_mixture(model_name: str, dtype: str, paths: Mapping[str, Path]) -> peft.PeftModel:
    base = load_base_model(model_name, dtype=dtype, device="cpu")[0]
    base.config.use_cache = False  # PEFT refuses to make a mixture with a cache
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        adapters={str(i): str(path) for i, path in enumerate(paths.values())},
        layerwise_scalings=True,
    )
    return peft.get_peft_model(base, config).eval()


def exactly(num_tokens: int) -> dict[str, Any]:
    return {"do_sample": False, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens}


def speed(run: Callable[[], Tensor], num_tokens: int) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        run()
        return num_tokens / (time.perf_counter() - start)

    return timed


def random_prompt(rows: int, length: int) -> Tensor:
    return torch.randint(1000, 40000, (rows, length), generator=torch.Generator().manual_seed(0))


def against_peft(options: argparse.Namespace, dtype: str, paths: Mapping[str, Path]) -> list[dict[str, Any]]:
    ours, theirs = with_mixture(options.model, dtype, paths), peft_mixture(options.model, dtype, paths)
    ids = random_prompt(1, 57)
    num_tokens = options.new_tokens
    sides = {
        "peft": speed(lambda: theirs.generate(input_ids=ids, **exactly(num_tokens)), num_tokens),
        "loraplex": speed(lambda: ours.generate(ids, adapters=[MIXTURE], **exactly(num_tokens)), num_tokens),
    }
    ours.generate(ids, adapters=[MIXTURE], **exactly(4))  # a warm-up; PEFT's run takes minutes, where one counts little
    return [{"tokens_per_s": {side: run() for side, run in sides.items()}}]


Run = Callable[[Tensor, Sequence[str | None], int], object]  # prompts [rows, length], adapters, new tokens


@contextmanager
def both_ways(model: MultiLoraModel, *, draft: bool) -> Iterator[dict[str, Run]]:
    """The same greedy generation by `model.generate` and by an engine of its own."""

    def generate(ids: Tensor, choices: Sequence[str | None], num_tokens: int) -> None:
        model.generate(ids, adapters=list(choices), draft=draft, **exactly(num_tokens))

    with Engine(model, EngineConfig(prefix_cache=False, draft=draft)) as engine:

        def serve(ids: Tensor, choices: Sequence[str | None], num_tokens: int) -> None:
            sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
            rows = zip(ids.tolist(), choices, strict=True)
            results = engine.generate([Request(prompt, adapters=choice, sampling=sampling) for prompt, choice in rows])
            assert all(len(result.token_ids) == num_tokens for result in results), "an answer ended early"

        yield {"generate": generate, "engine": serve}


def along_the_sequence(options: argparse.Namespace, dtype: str, paths: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Milliseconds a token around token 50 and around token 500: differences of whole generations."""
    model = with_mixture(options.model, dtype, paths)
    ids = random_prompt(1, 8)
    with both_ways(model, draft=False) as runs:

        def seconds(way: str, num_tokens: int) -> float:
            start = time.perf_counter()
            runs[way](ids, [MIXTURE], num_tokens)
            return time.perf_counter() - start

        lengths = (20, 80, 470, 530)
        sides = {f"{way} {n}": lambda way=way, n=n: seconds(way, n) for way in runs for n in lengths}
        times = medians(alternate(sides, options.rounds))
    return [
        {
            "way": way,
            "ms_at_50": (times[f"{way} 80"] - times[f"{way} 20"]) / 60 * 1e3,
            "ms_at_500": (times[f"{way} 530"] - times[f"{way} 470"]) / 60 * 1e3,
        }
        for way in runs
    ]


def science_or_random(options: argparse.Namespace, dtype: str, paths: Mapping[str, Path]) -> MultiLoraModel:
    if options.mixture is None:
        return with_mixture(options.model, dtype, paths)
    model = MultiLoraModel.from_pretrained(options.model, dtype=dtype)
    model.load_mixture(MIXTURE, options.mixture)
    return model


def drafted(options: argparse.Namespace, dtype: str, paths: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The science mixture on held-out questions where it is there; else random experts on the same prompts."""
    model = science_or_random(options, dtype, paths)
    prompts = [encode_prompts(model.tokenizer, [text])["input_ids"] for text in held_out_prompts(options.prompts)]

    def run(way: Run, choice: str | None) -> Callable[[], float]:
        def timed() -> float:
            start = time.perf_counter()
            for ids in prompts:
                way(ids, [choice], options.draft_tokens)
            return len(prompts) * options.draft_tokens / (time.perf_counter() - start)

        return timed

    with both_ways(model, draft=False) as plain, both_ways(model, draft=True) as drafting:
        sides = {}
        for way in plain:
            sides[f"{way} base"] = run(plain[way], None)
            sides[f"{way} undrafted"] = run(plain[way], MIXTURE)
            sides[f"{way} drafted"] = run(drafting[way], MIXTURE)
        speeds = medians(alternate(sides, options.rounds))
    counts = model.draft_counts
    known = {"acceptance": counts.accepted / counts.drafted, "mixture": str(options.mixture)}
    return [{"way": way, "tokens_per_s": of_way(speeds, way)} | known for way in plain]


def of_way(speeds: Mapping[str, float], way: str) -> dict[str, float]:
    """Those of the sides `way ...`, under the rest of their names."""
    return {side.removeprefix(f"{way} "): speed for side, speed in speeds.items() if side.startswith(f"{way} ")}


def held_out_prompts(num_prompts: int) -> list[str]:
    """Some questions of every domain's test split."""
    files = sorted((Path(__file__).parent.parent / "data").glob("*/test.jsonl"))
    lines = [file.read_text().splitlines() for file in files]
    texts = [line for same_rank in zip(*lines, strict=False) for line in same_rank][:num_prompts]
    return [json.loads(line)["messages"][0]["content"] for line in texts]


def batch_of_8(options: argparse.Namespace, dtype: str, paths: Mapping[str, Path]) -> list[dict[str, Any]]:
    model = with_mixture(options.model, dtype, paths)
    ids, num_tokens = random_prompt(8, 32), options.new_tokens
    adapters: list[str | None] = [list(paths)[i % len(paths)] for i in range(8)]
    rows: dict[str, list[str | None]] = {
        "base": [None] * 8,
        "all_mixture": [MIXTURE] * 8,
        "one_mixture": [MIXTURE, *adapters[1:]],
        "adapters": adapters,
    }
    with both_ways(model, draft=True) as ways:
        sides = {
            f"{way} {name}": speed(lambda run=run, choices=choices: run(ids, choices, num_tokens), 8 * num_tokens)
            for way, run in ways.items()
            for name, choices in rows.items()
        }
        speeds = medians(alternate(sides, options.rounds))
    return [{"way": way, "tokens_per_s": of_way(speeds, way)} for way in ways]


RUNS = {
    "peft": against_peft,
    "long": along_the_sequence,
    "draft": drafted,
    "batch": batch_of_8,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--peft-dtypes", nargs="+", default=["bfloat16", "float32"], help="for the question of PEFT")
    parser.add_argument("--mixture", type=Path, help="folder of a trained mixture, for the question of drafts")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--draft-tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        base = load_base_model(options.model, dtype="bfloat16", device="cpu")[0]
        paths = write_random_adapters(base, Path(folder), RANKS)
        for question in options.questions:
            for dtype in options.peft_dtypes if question == "peft" else options.dtypes:
                for case in RUNS[question](options, dtype, paths):
                    results.append({"question": question, "dtype": dtype} | case)
                    console.print(results[-1])
    report(results)
    if not options.no_save:
        workload = {key: str(value) for key, value in vars(options).items()}
        save("xlora", workload | {"ranks": RANKS, "targets": "all 7", "peft_prompt_tokens": 57}, results)


def report(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        speeds = result.get("tokens_per_s", {})
        figures = {key: value for key, value in result.items() if isinstance(value, float)} | speeds
        first = next(iter(speeds.values()), None)
        last = [f"{value / first:.2f}" for value in speeds.values()] if first else []
        cells = ", ".join(f"{key} {value:.2f}" for key, value in figures.items())
        label = ", ".join(result[key] for key in ("question", "way", "dtype") if key in result)
        rows.append([label, cells, " / ".join(last)])
    print_table("Mixtures", ["question", "figures", "relative to the first"], rows)


if __name__ == "__main__":
    main()
