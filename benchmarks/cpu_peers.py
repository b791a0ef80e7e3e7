"""How fast does the engine decode and read prompts beside OpenVINO GenAI, llama.cpp and transformers, on a CPU?

    sh benchmarks/peers/make_environments.sh build/peers openvino llamacpp    # once: about 3 GB
    python benchmarks/cpu_peers.py                                            # all models, jobs and sides
    python benchmarks/cpu_peers.py --models smollm2-135m --jobs decode:8 prefill:1024:adapters --rounds 1 --no-save

decode:ROWS and prefill:TOKENS run the base model. With :adapters, loraplex and PEFT (transformers' side) decode each
row through another adapter (rank 8, 7 targets); OpenVINO GenAI and llama.cpp can't, and run one and the same in all
rows. Prompts go through one adapter. Each side is a process with an environment of its own and its engine's defaults,
except that no prompt is remembered. They take turns, and only one works at a time.

Decoding is what the new tokens after the first take: the time of a run less that of a run of one token. Reading a
prompt is a run of one token. same_tokens is the share of tokens, up to the first different one, that are loraplex's.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import console, print_table, save
from peers.model_files import RANDOM_LLAMA, RANK, ModelFiles
from peers.sides import Side, same_share
from peers.worker import Job

MODELS = ("smollm2-135m", RANDOM_LLAMA)
JOBS = tuple(
    f"{kind}{suffix}"
    for suffix in ("", ":adapters")
    for kind in ("decode:1", "decode:8", "decode:32", "prefill:128", "prefill:1024", "prefill:4096")
)
BF16 = ("transformers", "openvino", "llamacpp")  # the sides whose weights are loraplex's
SIDES = ("loraplex", *BF16, "openvino-int8", "llamacpp-q8_0")
SCRIPTS = {
    "loraplex": "loraplex_engine.py",
    "transformers": "transformers_generate.py",
    "openvino": "openvino_batching.py",
    "llamacpp": "llama_cpp_batch.py",
}
NUM_ADAPTERS = 32
WARM_UP_TOKENS = 8
INSTRUCTIONS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all sides do: "decode:8:adapters"."""

    name: str
    new_tokens: int
    prompt_tokens: int  # of a row that decodes

    @property
    def decodes(self) -> bool:
        return self.name.startswith("decode")

    @property
    def size(self) -> int:
        """Rows that decode, or tokens of the prompt."""
        return int(self.name.split(":")[1])

    def job(self, new_tokens: int) -> Job:
        rows, length = (self.size, self.prompt_tokens) if self.decodes else (1, self.size)
        prompts = torch.randint(1000, 30000, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
        names = [f"adapter{i}" for i in range(rows)] if self.name.endswith(":adapters") else [None] * rows
        return {"prompts": prompts, "adapters": names, "new_tokens": new_tokens}

    def warm_up(self, side: Side) -> None:
        side.run(self.job(WARM_UP_TOKENS if self.decodes else 1))

    def measure(self, side: Side) -> tuple[float, list[list[int]]]:
        """Tokens/s, and the tokens."""
        first = side.run(self.job(1))
        if not self.decodes:
            return self.size / first["seconds"], first["tokens"]
        whole = side.run(self.job(self.new_tokens))
        num_tokens = whole["num_tokens"] - first["num_tokens"]
        assert num_tokens == self.size * (self.new_tokens - 1), f"{side.name} gave {whole['num_tokens']} tokens"
        return num_tokens / (whole["seconds"] - first["seconds"]), whole["tokens"]

    def comparable(self, side: str, tokens: list[list[int]]) -> list[list[int]]:
        """The rows that went through the adapters of loraplex's."""
        one_adapter = self.name.endswith(":adapters") and side.startswith(("openvino", "llamacpp"))
        return tokens[:1] if one_adapter else tokens


def start(name: str, files: ModelFiles, options: argparse.Namespace, folder: Path) -> Side:
    """A side's process, with the model's files as it reads them."""
    engine, _, weights = name.partition("-")
    workload: dict[str, Any] = {"threads": options.threads, "adapters": files.adapters, "dtype": "bfloat16"}
    python = sys.executable if engine in ("loraplex", "transformers") else f"{options.folder}/{engine}/bin/python"
    if engine == "llamacpp":
        workload |= {"model_file": files.gguf(weights.upper() or "BF16"), "adapters": files.gguf_adapters()}
    elif engine == "openvino":
        first = dict([next(iter(files.adapters.items()))])
        workload |= {"model_folder": files.openvino(weights or "fp16", python), "adapters": first, "precision": "bf16"}
    else:
        workload |= {"model_folder": files.transformers}
    return Side(name, python, SCRIPTS[engine], workload, folder)


def measure(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every job of a model; the sides stay loaded from one job to the next."""
    files = ModelFiles(name=model, folder=Path(options.folder) / "models" / model, num_adapters=NUM_ADAPTERS)
    sides: list[Side] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in options.sides:
                console.print(f"{model}: {name} starts ...")
                sides.append(start(name, files, options, Path(folder)))
            return [measure_job(model, job, sides, options) for job in options.jobs]
        finally:
            for side in sides:
                side.close()


def measure_job(model: str, name: str, sides: list[Side], options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds."""
    task = Task(name=name, new_tokens=options.new_tokens, prompt_tokens=options.prompt_tokens)
    for side in sides:
        task.warm_up(side)
    speeds: dict[str, list[float]] = {side.name: [] for side in sides}
    tokens: dict[str, list[list[int]]] = {}
    for _ in range(options.rounds):
        for side in sides:
            speed, tokens[side.name] = task.measure(side)
            speeds[side.name].append(speed)
    ours = tokens.get("loraplex")
    result = {
        "model": model,
        "job": name,
        "tokens_per_s": {side: statistics.median(values) for side, values in speeds.items()},
        "rounds": speeds,
        "versions": {side.name: side.version for side in sides},
        "same_tokens": {
            side: same_share(task.comparable(side, ours), task.comparable(side, theirs))
            for side, theirs in tokens.items()
            if ours is not None and side != "loraplex"
        },
    }
    shown = ", ".join(f"{side} {speed:.1f}" for side, speed in result["tokens_per_s"].items())
    console.print(f"{model} {name}: {shown}; same tokens: {result['same_tokens']}")
    return result


def ratio(speeds: dict[str, float]) -> str:
    """loraplex to the best of the peers with bfloat16 weights."""
    peers = [speeds[side] for side in BF16 if side in speeds]
    return f"{speeds['loraplex'] / max(peers):.2f}x" if peers and "loraplex" in speeds else "-"


def instructions() -> list[str]:
    """Those that decide which products are fast, of this processor."""
    file = Path("/proc/cpuinfo")
    words = set(file.read_text().split()) if file.exists() else set()
    return [name for name in INSTRUCTIONS if name in words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), metavar="decode:ROWS|prefill:TOKENS[:adapters]")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of each row that decodes")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", default="build/peers", help="the environments; the models are written into it")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    results = [result for model in options.models for result in measure(model, options)]
    rows = [
        [
            f"{result['model']}, {result['job']}",
            *(f"{result['tokens_per_s'][side]:.1f}" for side in options.sides),
            ratio(result["tokens_per_s"]),
        ]
        for result in results
    ]
    print_table("The engine beside others on a CPU, tokens/s", ["job", *options.sides, "loraplex / best bf16"], rows)
    if not options.no_save:
        workload = vars(options) | {"rank": RANK, "targets": "all 7", "instructions": instructions()}
        save("cpu_peers", workload, results)


if __name__ == "__main__":
    main()
