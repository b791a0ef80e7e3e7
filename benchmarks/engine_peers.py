"""How fast is the engine beside other engines on this machine? Each side in a process and environment of its own.

    sh benchmarks/peers/make_environments.sh    # once: about 3 GB in build/peers
    python benchmarks/engine_peers.py           # all cases
    python benchmarks/engine_peers.py --cases vllm:float32 --rounds 1 --no-save

A case is peer:dtype. vllm: its CPU build with 8 requests at once, each through its own adapter (ranks 4 to 32, 7
targets). mistralrs: one request to the base model. The sides take turns, one round each; only one works at a time.
Tokens/s are those of a whole round, prompts included. For vllm the share of equal tokens is told too.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import console, print_table, save
from peers.sides import Side, same_share
from peers.worker import Job

from loraplex.bench.random_adapters import load_model, write_random_folders
from loraplex.models.checkpoints.loading import resolve_base_model

RANKS = (8, 16, 4, 32, 8, 8, 8, 8)
TEXT = "The history of science is the study of how people came to know what they know about nature. Long before"
SCRIPTS = {"loraplex": "loraplex_engine.py", "vllm": "vllm_cpu.py", "mistralrs": "mistral_rs.py"}
CASES = ("vllm:float32", "vllm:bfloat16", "mistralrs:float32")


def make_work(peer: str, dtype: str, options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], Job]:
    """Model and adapters, and then the prompts and lengths, as all sides read them."""
    model = load_model(options.model, dtype)
    end = model.base.generation_config.eos_token_id
    adapters: dict[str, Path] = {}
    prompts = [model.tokenizer(TEXT)["input_ids"]]
    if peer == "vllm":
        adapters = write_random_folders(model.adaptable.shapes, folder, RANKS, model.dtype)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(1000, 40000, (len(adapters), options.prompt_tokens), generator=generator).tolist()
    workload = {
        "model_folder": resolve_base_model(options.model),
        "dtype": dtype,
        "adapters": {name: str(path) for name, path in adapters.items()},
        "text": TEXT,
        "end_tokens": end if isinstance(end, list) else [end],
        "threads": options.threads,
    }
    job = {"prompts": prompts, "adapters": list(adapters) or [None], "new_tokens": options.new_tokens}
    return workload, job


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of tokens/s, the sides in turn."""
    peer, dtype = case.split(":")
    pythons = {"loraplex": sys.executable, "vllm": options.vllm_python, "mistralrs": options.mistralrs_python}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload, job = make_work(peer, dtype, options, folder)
        sides: list[Side] = []
        try:
            for side in ("loraplex", peer):
                sides.append(Side(side, pythons[side], SCRIPTS[side], workload, folder))
                sides[-1].run(job)
            rounds = [{side.name: side.run(job) for side in sides} for _ in range(options.rounds)]
        finally:
            for side in sides:
                side.close()
    speeds = {
        side.name: [answers[side.name]["num_tokens"] / answers[side.name]["seconds"] for answers in rounds]
        for side in sides
    }
    last = rounds[-1]
    num_tokens = {name: answer["num_tokens"] for name, answer in last.items()}
    assert len(set(num_tokens.values())) == 1, f"not the same work: {num_tokens} tokens"
    return {
        "case": case,
        "tokens_per_s": {name: statistics.median(values) for name, values in speeds.items()},
        "rounds": speeds,
        "versions": {side.name: side.version for side in sides},
        "same_tokens": same_share(last["loraplex"]["tokens"], last[peer]["tokens"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vllm-python", default="build/peers/vllm/bin/python")
    parser.add_argument("--mistralrs-python", default="build/peers/mistralrs/bin/python")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    results = []
    for case in options.cases:
        console.print(f"{case} ...")
        results.append(measure(case, options))
        console.print(results[-1])
    rows = []
    for result in results:
        ours, (peer, theirs) = result["tokens_per_s"]["loraplex"], list(result["tokens_per_s"].items())[1]
        rows.append([result["case"], f"{ours:.1f}", f"{peer} {theirs:.1f}", f"{ours / theirs:.2f}x"])
    print_table("The engine beside its peers, tokens/s", ["case", "loraplex", "peer", "ratio"], rows)
    if not options.no_save:
        save("engine_peers", vars(options) | {"ranks": RANKS, "targets": "all 7"}, results)


if __name__ == "__main__":
    main()
