"""Fill the figures in the documentation from the files that the benchmarks and the evaluation wrote.

    python scripts/update_figures.py          # rewrite the marked blocks
    python scripts/update_figures.py --check  # write nothing; status 1 if a block differs

A block stands between `<!-- NAME:start -->` and `<!-- NAME:end -->` in docs/performance.md:

    figures  a table for each result file, with machine, versions and workload
    quality  held-out quality of the adapters in examples/adapters

The README's chart is drawn by scripts/draw_speed.py.

A result file that is missing is said to be missing, in the block and on the terminal.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("docs/performance.md",)
RESULTS = "benchmarks/results"
QUALITY = "examples/adapters/quality.json"
BASELINES = "data/README.md"

Results = Mapping[str, Any]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers, which all columns but the first hold, stand to the right."""
    marks = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, marks, *rows))


def ratio(speeds: Mapping[str, float], over: str, under: str) -> str:
    return f"{speeds[over] / speeds[under]:.2f}x"


def mixed_batch(content: Results) -> str:
    rows = []
    for case in content["results"]:
        speeds = case["tokens_per_s"]
        rows.append(
            [
                f"{case['dtype']}, {case['rows']} rows, {case['rows']} adapters",
                *(f"{speeds[side]:.0f}" for side in ("base", "peft", "loraplex")),
                ratio(speeds, "loraplex", "peft"),
                ratio(speeds, "loraplex", "base"),
            ]
        )
    columns = ["generation, tokens/s", "base, no adapters", "PEFT", "loraplex", "loraplex / PEFT", "loraplex / base"]
    return table(columns, rows)


_MODELS = {"135m": "SmolLM2-135M", "1.1b": "random, 1.1B"}
_TRAINERS = {
    "peft": "PEFT",
    "peft_eager": "PEFT, eager attention",
    "peft_16_bit_adapters": "PEFT, 16-bit adapters",
    "loraplex": "loraplex",
    "loraplex_packed": "loraplex, packed",
}


def training(content: Results) -> str:
    """Speeds of the sides that were measured; the better PEFT is of those with adapters in float32, as ours are."""
    cases = content["results"]
    sides = [side for side in _TRAINERS if any(side in case["tokens_per_s"] for case in cases)]
    ours = [side for side in sides if side.startswith("loraplex")]
    rows = []
    for case in cases:
        speeds = case["tokens_per_s"]
        model = [_MODELS[case["model"]]] if "model" in case else []
        rows.append(
            [
                ", ".join([*model, case["dtype"], f"batch size {case['batch_size']}"]),
                *(f"{speeds[side]:.0f}" if side in speeds else "" for side in sides),
                *(f"{speeds[side] / max(speeds['peft'], speeds['peft_eager']):.2f}x" for side in ours),
            ]
        )
    ratios = [f"{_TRAINERS[side]} / better PEFT" for side in ours]
    return table(["training, tokens/s", *(_TRAINERS[side] for side in sides), *ratios], rows)


def training_service(content: Results) -> str:
    rows = []
    for case in content["results"]["clients"]:
        speeds = case["tokens_per_s"]
        sides = (f"{speeds[side]:.0f}" for side in ("after_another", "at_once"))
        rows.append([f"{case['clients']} clients", *sides, ratio(speeds, "at_once", "after_another")])
    times = content["results"]["first_token"]
    first = [f"{times[side]:.0f}" for side in ("loaded_ms", "new_weights_ms")]
    return "\n\n".join(
        (
            table(["training, tokens/s", "one after the other", "at once", "at once / one after the other"], rows),
            table(
                ["first token, ms", "an adapter that is loaded", "the weights of the last step", "new / loaded"],
                [["from the optimizer step's result", *first, ratio(times, "new_weights_ms", "loaded_ms")]],
            ),
        )
    )


def moe_experts(content: Results) -> str:
    sides = ("none", "one for all", "one each", "PEFT, one for all")
    rows = []
    for case in content["results"]:
        speeds = case["tokens_per_s"]
        ratios = [ratio(speeds, "one each", other) for other in ("none", "PEFT, one for all")]
        rows.append([f"{case['dtype']}, {case['rows']} rows", *(f"{speeds[side]:.0f}" for side in sides), *ratios])
    return table(["decoding, tokens/s", *sides, "one each / none", "one each / PEFT's one for all"], rows)


def memory(content: Results) -> str:
    rows = []
    for case in content["results"]:
        for stage in ("loaded", "generated"):
            figures = case[stage]
            rows.append(
                [
                    f"{case['dtype']}, {stage}",
                    *(f"{size / 1e6:.0f}" for size in (case["adapter_bytes"], figures["base_peak"], figures["peak"])),
                    f"{figures['added_per_adapter_byte']:.2f}",
                ]
            )
    columns = ["peak of resident memory, MB", "adapters' own", "base model alone", "with all", "added / adapters' own"]
    return table(columns, rows)


def zipf(content: Results) -> str:
    results, settings = content["results"], content["workload"]
    sides = {
        f"drawn from {settings['adapters']}, {settings['host_adapters']} fit into memory": results["zipf"],
        f"the same {settings['slots']} all the time": results["fixed"],
    }
    rows = [
        [label, f"{side['tokens_per_s']:.0f}", f"{side['median_batch_s']:.2f}", f"{side['max_batch_s']:.2f}"]
        for label, side in sides.items()
    ]
    found = ", ".join(f"{share:.0%} in {tier}" for tier, share in results["zipf"]["found_in"].items())
    return (
        table(["adapters", "tokens/s", "median batch, s", "slowest batch, s"], rows)
        + f"\n\n{results['ratio']:.2f} of the speed; a batch's adapters were found: {found}."
    )


def kernels(content: Results) -> str:
    """Microseconds a call: the adapters of one module by kernel, and the base product by torch and compiled."""
    parts = []
    for part, unit in (("adapters", "tokens_per_row"), ("base_product", "rows")):
        cases = content["results"][part]
        columns = [column for column in cases[0] if column not in ("dtype", unit)]
        rows = [[f"{case['dtype']}, {case[unit]}", *(f"{case[c]:.0f}" for c in columns)] for case in cases]
        label = f"{part.replace('_', ' ')}, microseconds; {unit.replace('_', ' ')}"
        parts.append(table([label, *columns], rows))
    return "\n\n".join(parts)


def int8_quality(content: Results) -> str:
    """How far each kind of weights takes the predictions from float32's."""
    rows = [
        [side.replace("_", " "), f"{found['divergence']:.2e}", f"{found['same_token']:.1%}"]
        for side, found in content["results"].items()
    ]
    return table(["weights", "KL divergence from float32, nats a token", "same likeliest token"], rows)


def int8_speed(content: Results) -> str:
    """Microseconds of a product with each kind of weights, and how many times as fast as bfloat16's it is."""
    rows = []
    for case in content["results"]:
        first = case["us"]["bfloat16"]
        cells = [f"{us:.0f} ({first / us:.2f}x)" for us in case["us"].values()]
        rows.append([f"{case['in']} to {case['out']}, rows {case['rows']}", *cells])
    kinds = [kind.replace("_", " ") for kind in content["results"][0]["us"]]
    return table(["product, microseconds", *kinds], rows)


def quantized_training(content: Results) -> str:
    """Memory of training on each kind of weights, and its share of bfloat16's."""
    first, rows = content["results"]["bfloat16"], []
    for kind, found in content["results"].items():
        sizes = [f"{found[name] / 2**20:.0f}" for name in ("loaded", "peak")]
        above = (found["peak"] - found["before"]) / (first["peak"] - first["before"])
        rows.append([kind, *sizes, f"{found['peak'] / first['peak']:.2f}x", f"{above:.2f}x"])
    return table(["weights", "loaded, MiB", "peak in training, MiB", "of bfloat16's", "without the libraries"], rows)


def xlora(content: Results) -> str:
    """Each question's speeds or times, and their ratio to what the question compares with."""
    rows = []
    for case in content["results"]:
        speeds = case.get("tokens_per_s", {})
        cells = [f"{side.replace('_', ' ')} {speed:.1f}" for side, speed in speeds.items()]
        first = next(iter(speeds.values()), None)
        ratios = [f"{speed / first:.2f}x" for speed in list(speeds.values())[1:]] if first else []
        if "acceptance" in case:
            ratios.append(f"{case['acceptance']:.0%} of the drafts right")
        if "ms_at_50" in case:
            cells = [f"{case['ms_at_50']:.1f} ms a token at token 50", f"{case['ms_at_500']:.1f} at token 500"]
            ratios = [f"{case['ms_at_500'] / case['ms_at_50']:.2f}x"]
        label = [XLORA_QUESTIONS[case["question"]], XLORA_WAYS[case["way"]] if "way" in case else "", case["dtype"]]
        rows.append([", ".join(part for part in label if part), ", ".join(cells), ", ".join(ratios)])
    return table(["mixtures, tokens/s", "sides", "against the first"], rows)


XLORA_QUESTIONS = {
    "peft": "57 prompt tokens and 128 new ones, batch 1",
    "long": "along a sequence, undrafted",
    "draft": "questions of the test data, batch 1",
    "batch": "batch 8",
}
XLORA_WAYS = {"generate": "`model.generate`", "engine": "the engine"}


def routers(content: Results) -> str:
    """Milliseconds of a step by side, and the speed as a part of base rows' and of one adapter's of the same rank."""
    rows = []
    for case in content["results"]:
        for side, step_ms in case["step_ms"].items():
            label = f"{case['dtype']}, {case['rows']} rows, {side}"
            rows.append([label, f"{step_ms:.2f}", f"{case['of_base'][side]:.2f}x", f"{case['of_one'][side]:.2f}x"])
    return table(["a decoding step", "milliseconds", "of base rows' speed", "of one adapter's of rank 32"], rows)


def engine_decode(content: Results) -> str:
    sides = list(content["results"][0]["tokens_per_s"])
    rows = [
        [f"{case['dtype']}, {case['rows']} rows", *(f"{case['tokens_per_s'][side]:.0f}" for side in sides)]
        for case in content["results"]
    ]
    names = {"generate": "transformers' generate", "base": "engine, no adapters", "adapters": "adapters, ranks 4 to 32"}
    names |= {"rank8": "adapters, rank 8", "mixture": "a mixture of four"}
    return table(["decoding, tokens/s", *(names[side] for side in sides)], rows)


def engine_prefix(content: Results) -> str:
    keys = ("first", "later", "later_of_first", "last_at_once")
    cells = [f"{content['results'][key]:.3f}" for key in keys]
    label = f"{content['workload']['requests']} requests that share {content['workload']['prefix_tokens']} tokens"
    return table(
        ["seconds to the first token", "first", "later ones", "ratio", "all at once, the last"], [[label, *cells]]
    )


def hostile_tenant(content: Results) -> str:
    results = content["results"]
    alone = [figures["p50_s"] for figures in results["alone"]]
    rows = [["alone", f"{statistics.median(alone):.3f}", f"{results['p99_alone_s']:.3f}", "", "0"]]
    for name, figures in results["attacks"].items():
        failed = figures["wrong"] + len(figures["failures"])
        rows.append(
            [
                name.replace("_", " "),
                f"{figures['p50_s']:.3f}",
                f"{figures['p99_s']:.3f}",
                f"{figures['p99_ratio']:.1f}x",
                f"{failed}",
            ]
        )
    return table(["beside", "p50", "p99", "p99 of that alone", "wrong or failed"], rows)


def engine_load(content: Results) -> str:
    settings = content["workload"]
    labels = {
        "resident": f"the same {settings['resident']}",
        "zipf": f"{settings['adapters']} on disk, by Zipf's law, {settings['host_adapters']} in memory",
    }
    rows = []
    for side, label in labels.items():
        report = content["results"][side]
        first = report["first_token_s"]
        times = (first["p50"], first["p99"], statistics.median(report["turn_p99_s"]), max(report["turn_p99_s"]))
        cells = [f"{report['tokens_per_s']:.0f}", *(f"{seconds:.2f}" for seconds in times), str(report["requests"])]
        rows.append([label, *cells])
    header = [
        "adapters",
        "tokens/s",
        "first token p50, s",
        "p99, s",
        "of the median turn",
        "of the slowest",
        "requests",
    ]
    return table(header, rows)


def engine_churn(content: Results) -> str:
    keys = ("finished", "checked", "cancelled", "refused", "replaced", "unloaded")
    counts = content["results"]
    cells = [*(str(counts[key]) for key in keys), str(len(counts["problems"]))]
    return table(["model", *keys, "problems"], [[content["workload"]["model"], *cells]])


def engine_peers(content: Results) -> str:
    rows = []
    for case in content["results"]:
        speeds = case["tokens_per_s"]
        peer = next(side for side in speeds if side != "loraplex")
        label = f"{peer} {case['versions'][peer]}, {case['case'].split(':')[1]}"
        rows.append([label, f"{speeds[peer]:.1f}", f"{speeds['loraplex']:.1f}", ratio(speeds, "loraplex", peer)])
    return table(["the engine beside a peer, tokens/s", "peer", "loraplex", "loraplex / peer"], rows)


def cpu_peers(content: Results) -> str:
    """A column for each side; loraplex is compared with the best of those whose weights are bfloat16 as well."""
    sides = list(content["results"][0]["tokens_per_s"])
    versions = content["results"][0]["versions"]
    rows = []
    for case in content["results"]:
        kind, size, *adapters = case["job"].split(":")
        job = f"decode, {size} rows" if kind == "decode" else f"prompt of {size}"
        speeds = case["tokens_per_s"]
        best = max((side for side in sides if side in CPU_PEERS_BF16), key=speeds.__getitem__)
        label = ", ".join((case["model"], job, *adapters))
        rows.append([label, *(f"{speeds[side]:.0f}" for side in sides), ratio(speeds, "loraplex", best)])
    header = [f"{side} {versions[side]}" for side in sides]
    fast = " ".join(content["workload"]["instructions"]) or "none"
    return (
        table(["tokens/s", *header, "loraplex / best bf16 peer"], rows)
        + "\n\nWith adapters, loraplex and transformers (PEFT) decode each row through another one; OpenVINO GenAI and "
        + "llama.cpp can't, and run the same one in all rows. Prompts go through one adapter. "
        + f"Instructions of this processor: {fast}."
    )


CPU_PEERS_BF16 = ("transformers", "openvino", "llamacpp")


def http_overhead(content: Results) -> str:
    found, settings = content["results"], content["workload"]
    label = f"{settings['streams']} streams of {settings['tokens']} tokens"
    speeds = found["tokens_per_s"]
    cells = [f"{speeds['engine']:.0f}", f"{speeds['http']:.0f}", f"{found['ratio']:.3f}"]
    columns = ["tokens/s", "engine alone", "over HTTP", "over HTTP / alone", "tokens a chunk"]
    return table(columns, [[label, *cells, f"{found['tokens_per_chunk']:.2f}"]])


def tool_calls(content: Results) -> str:
    """By category: how many cases' calls fit their schemas, and how many are what was meant."""
    rows = [
        [name, *(str(counts[key]) for key in ("cases", "calls", "fit", "right_functions", "right_calls"))]
        for name, counts in content["results"].items()
    ]
    return table(["cases", "asked", "calls", "parse and fit", "the right functions", "the right calls"], rows)


def linked(content: Results) -> str:
    found = content["results"]
    rows = [[label, f"{speed:.0f}", f"{found['ratio'][label]:.2f}x"] for label, speed in found["tokens_per_s"].items()]
    return table(["what rows of a batch of 8 ask for", "tokens/s of the batch", "of nothing"], rows)


def adapter_kinds(content: Results) -> str:
    """Quality, training, bytes and cost of each kind."""
    rows = []
    for kind, own in content["results"].items():
        cells = [f"{own['behaves']:.2f}", f"{own['right']:.2f}", "", "", "", ""]
        if "bytes" in own:
            loss = "" if own["loss"] is None else f"{own['loss']:.3f}"
            cells[2:] = [loss, f"{own['cpu_minutes']:.1f}", f"{own['bytes'] / 1000:.0f}", f"{own['of_none']:.2f}x"]
        label = kind if own.get("weight", 1) == 1 else f"{kind}, weight {own['weight']:g}"
        rows.append([label, *cells])
    columns = ["kind", "behaves", "facts still right", "held-out loss", "CPU minutes of training", "kB"]
    return table([*columns, "decoding, of none"], rows)


def vllm_plugin(content: Results) -> str:
    found = content["results"]
    parts = []
    if speeds := found.get("without a mixture, tokens/s"):
        rows = [[case, *(f"{of[side]:.0f}" for side in of), ratio(of, "plugin", "vllm")] for case, of in speeds.items()]
        columns = ["engine without mixtures, tokens/s", "vLLM", "with the plugin", "plugin / vLLM"]
        parts.append(table(columns, rows))
    if speeds := found.get("with mixtures on, tokens/s"):
        rows = [
            [case, *(f"{of[side]:.0f}" for side in of), ratio(of, "x-lora", "plain")] for case, of in speeds.items()
        ]
        columns = ["engine with a second cache, tokens/s", "base", "plain LoRA", "X-LoRA", "X-LoRA / plain LoRA"]
        parts.append(table(columns, rows))
    if speeds := found.get("with routers on, tokens/s"):
        rows = [
            [case, *(f"{of[side]:.0f}" for side in of), ratio(of, "arrow", "plain"), ratio(of, "spectr", "plain")]
            for case, of in speeds.items()
        ]
        columns = ["mixtures in one pass, tokens/s", "base", "plain LoRA", "Arrow", "SpectR"]
        parts.append(table([*columns, "Arrow / plain LoRA", "SpectR / plain LoRA"], rows))
    if speeds := found.get("without a residual, tokens/s"):
        rows = [[case, *(f"{of[side]:.0f}" for side in of), ratio(of, "plugin", "vllm")] for case, of in speeds.items()]
        columns = ["engine with residuals, of which the batch has none, tokens/s", "vLLM", "with the plugin"]
        parts.append(table([*columns, "plugin / vLLM"], rows))
    if speeds := found.get("with residuals on, tokens/s"):
        rows = [
            [case, *(f"{of[kind]:.0f}" for kind in of), *(ratio(of, kind, "base") for kind in list(of)[1:])]
            for case, of in speeds.items()
        ]
        columns = ["a residual in every row, tokens/s", "base", "vector", "linked", "chain of two", "vector / base"]
        parts.append(table([*columns, "linked / base", "chain / base"], rows))
    for part, apart in content.get("measured apart", {}).items():
        clock = ", by the process's CPU time beside other work" if apart["clock"] == "cpu" else ""
        parts.append(
            f"Of these, {part}: {apart['date']} at commit {apart['commit']} on {_cores(apart['cores'])} of "
            f"{apart['cpu']}{clock}."
        )
    if answers := found.get("parity with PEFT"):
        rows = [[case, *(f"{of[key]:g}" for key in of)] for case, of in answers.items()]
        parts.append(
            table(["greedy answers beside PEFT's", "tokens", "wrong", "largest difference of a logprob"], rows)
        )
    return "\n\n".join(parts)


def auto_choice(content: Results) -> str:
    """How many questions choose the right adapter, what else was tried, where the floor is, and what choosing costs."""
    found = content["results"]
    rows = []
    for domain, own in found["choice"].items():
        other = found["other wording"][domain]
        cells = [f"{own['questions']}", f"{own['right']:.3f}", f"{own['least_score']:.2f}", f"{other['right']:.2f}"]
        rows.append([domain, *cells])
    total = sum(own["questions"] for own in found["choice"].values())
    right = sum(own["questions"] * own["right"] for own in found["choice"].values()) / total
    rows.append(["all", f"{total}", f"{right:.3f}", "", ""])
    columns = [f"questions among {content['workload']['adapters']} adapters", "asked", "right", "least score"]
    choices = table([*columns, "right in other wording"], rows)
    floors = table(
        ["floor", "own questions above it", "other prompts above it"],
        [[f"{at['floor']:.2f}", f"{at['own']:.3f}", f"{at['elsewhere']:.3f}"] for at in found["floors"]],
    )
    kinds = ("questions", "other wording", "other tasks")
    ways = table(
        ["right by", *(kind if kind == "questions" else f"in {kind}" for kind in kinds)],
        [[way, *(f"{shares[kind]:.2f}" for kind in kinds)] for way, shares in found["ways"].items()],
    )
    methods = table(["right of four, without others", "share"], [[w, f"{s:.2f}"] for w, s in found["methods"].items()])
    times = []
    for at in found["cost"]:
        cells = [f"{at[name]:.0f}" for name in ("base", "choosing", "named", "auto")]
        times.append([f"{at['prompt_tokens']} tokens", *cells, f"{at['ratio']:.2f}x"])
    columns = ["prompt, ms", "base model's pass", "pass that chooses", "first token by name", "first token by auto"]
    costs = table([*columns, "choosing / base"], times)
    return "\n\n".join((choices, floors, ways, methods, costs))


@dataclass(frozen=True, kw_only=True)
class ResultFile:
    """One file of benchmarks/results: the question that it answers and how it becomes a table."""

    name: str
    question: str
    render: Callable[[Results], str]
    engine_command: str | None = None  # of `loraplex bench engine`, instead of a script
    script: str | None = None  # in benchmarks, and its options; None: NAME.py

    @property
    def command(self) -> str:
        """What measures it."""
        if self.engine_command is not None:
            return f"loraplex bench engine {self.engine_command} --full"
        return f"python benchmarks/{self.script or f'{self.name}.py'}"

    def block(self, root: Path) -> str:
        path = root / RESULTS / f"{self.name}.json"
        title = f"**{self.question}** (`{self.command}`)"
        if not path.exists():
            return f"{title}\n\nNot measured yet: there is no `{RESULTS}/{self.name}.json`."
        content = json.loads(path.read_text())
        about = f"{machine(content['environment'])} Workload: {workload(content['workload'])}."
        return "\n\n".join((title, self.render(content), about))


FILES = (
    ResultFile(name="mixed_batch", question="A batch whose rows all use different adapters", render=mixed_batch),
    ResultFile(
        name="training", question="Four adapters trained together, against one after the other", render=training
    ),
    ResultFile(
        name="training_service",
        question="Clients of the training service at once, and the first token of new weights",
        render=training_service,
    ),
    ResultFile(name="xlora", question="X-LoRA mixtures of four experts on all 7 targets", render=xlora),
    ResultFile(
        name="moe_experts",
        question="Adapters of experts and of the router, one for each row, in a mixture-of-experts model",
        render=moe_experts,
    ),
    ResultFile(name="routers", question="Mixtures in one pass, four experts of rank 8", render=routers),
    ResultFile(name="mixture_training", question="Training a scaling head, against PEFT", render=training),
    ResultFile(name="memory", question="Memory that loaded adapters take beyond their own bytes", render=memory),
    ResultFile(name="zipf", question="A thousand adapters on disk", render=zipf),
    ResultFile(
        name="linked",
        question="What residuals, captures and steering of some rows cost the whole batch",
        render=linked,
    ),
    ResultFile(
        name="residuals",
        question="What vectors, ReFT, linked residuals and steering cost the engine",
        render=linked,
    ),
    ResultFile(
        name="residuals_1.1b",
        question="The same in a model of 1.1 billion parameters",
        render=linked,
        script="residuals.py --shape 1.1b",
    ),
    ResultFile(
        name="adapter_kinds",
        question="What a residual is good for: one behaviour, taught to adapters of equal size, and a vector",
        render=adapter_kinds,
    ),
    ResultFile(
        name="engine_decode",
        question="The engine, every row through another adapter",
        render=engine_decode,
        engine_command="decode",
    ),
    ResultFile(name="engine_peers", question="The engine beside other engines, each by itself", render=engine_peers),
    ResultFile(
        name="cpu_peers",
        question="Decoding and prompts beside OpenVINO GenAI, llama.cpp and transformers",
        render=cpu_peers,
    ),
    ResultFile(
        name="http_overhead",
        question="The HTTP server beside the engine alone",
        render=http_overhead,
    ),
    ResultFile(
        name="hostile_tenant",
        question="One tenant under attack by another: seconds to the first token",
        render=hostile_tenant,
    ),
    ResultFile(
        name="tool_calls",
        question="Calls of tools by SmolLM2, constrained by their schemas",
        render=tool_calls,
    ),
    ResultFile(
        name="engine_prefix",
        question="A prefix that requests share",
        render=engine_prefix,
        engine_command="prefix",
    ),
    ResultFile(
        name="engine_load",
        question="A thousand adapters, asked for at random times",
        render=engine_load,
        engine_command="load",
    ),
    ResultFile(
        name="engine_churn",
        question="Cancels, bad requests, adapters that change and go",
        render=engine_churn,
        engine_command="churn",
    ),
    ResultFile(
        name="vllm_plugin",
        question="What the plugin costs inside vLLM (CPU), and its answers beside PEFT's",
        render=vllm_plugin,
    ),
    ResultFile(name="auto_choice", question="A prompt that chooses its adapter", render=auto_choice),
    ResultFile(name="int8_quality", question="What 8-bit weights change", render=int8_quality),
    ResultFile(name="int8_speed", question="Products with 8-bit weights", render=int8_speed),
    ResultFile(name="quantized_training", question="Training on a base model in 4 bits", render=quantized_training),
    ResultFile(name="kernel_choice", question="Which kernel for how many tokens", render=kernels),
)


def machine(environment: Results) -> str:
    installed = {name: version for name, version in environment["versions"].items() if version != "not installed"}
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    return (
        f"Measured {environment['date']} at commit {environment['commit']} on {_cores(environment['cores'])} of "
        f"{environment['cpu']}; {versions}."
    )


def workload(settings: Results) -> str:
    shown = {key: value for key, value in settings.items() if key != "no_save"}
    return ", ".join(f"{key} {_plain(value)}" for key, value in shown.items())


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def figures(root: Path) -> str:
    """A table for each result file, with machine, versions and workload."""
    return "\n\n".join(file.block(root) for file in FILES)


def quality(root: Path) -> str:
    """Exact match of every domain's adapter beside the base model, the other adapters, and simple baselines."""
    path = root / QUALITY
    if not path.exists():
        return f"Not measured yet: there is no `{QUALITY}`."
    scores = json.loads(path.read_text())
    ngrams = ngram_baselines(root)
    rows = []
    for domain, score in scores.items():
        exact = score["exact"]
        others = max((value for name, value in exact.items() if name not in ("base", domain)), default=None)
        rows.append(
            [
                domain,
                str(score["num_questions"]),
                f"{score['majority']:.3f}",
                ngrams.get(domain, "-"),
                f"{exact['base']:.3f}",
                f"{score['among_labels']['base']:.3f}",
                "-" if others is None else f"{others:.3f}",
                f"**{exact[domain]:.3f}**",
            ]
        )
    columns = ["domain", "questions", "majority", "n-grams", "base", "base, labels only", "best other", "its adapter"]
    above = [domain for domain in scores if scores[domain]["exact"][domain] > float(ngrams.get(domain, "inf"))]
    return f"{table(columns, rows)}\n\nAdapters above the n-grams: {', '.join(above) or 'none'}."


def ngram_baselines(root: Path) -> dict[str, str]:
    """By domain, the last column of the table under "Baselines" in data/README.md."""
    section = (root / BASELINES).read_text().partition("## Baselines")[2]
    return dict(re.findall(r"^\| (\w+) \| [\d.]+ \| ([\d.]+) \|$", section, flags=re.MULTILINE))


def fill(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of block `name`; unchanged without the marks."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    return f"{before}{start}\n\n{content}\n\n{end}{after}" if found and ended else text


def updated(document: str, root: Path = ROOT) -> str:
    """The text of a document with all its blocks filled."""
    text = (root / document).read_text(encoding="utf-8")
    text = fill(text, "figures", figures(root))
    return fill(text, "quality", quality(root))


def missing(root: Path = ROOT) -> list[str]:
    paths = [f"{RESULTS}/{file.name}.json" for file in FILES] + [QUALITY]
    return [path for path in paths if not (root / path).exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    changed = [document for document in DOCUMENTS if updated(document) != (ROOT / document).read_text(encoding="utf-8")]
    for path in missing():
        print(f"missing: {path}")
    for document in changed:
        print(f"{'differs' if options.check else 'updated'}: {document}")
        if not options.check:
            (ROOT / document).write_text(updated(document), encoding="utf-8")
    sys.exit(bool(options.check and changed))


def _cores(number: int) -> str:
    return "1 core" if number == 1 else f"{number} cores"


if __name__ == "__main__":
    main()
