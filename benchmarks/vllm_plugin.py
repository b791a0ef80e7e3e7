"""What the plugin costs inside vLLM, and whether its answers are PEFT's; run it in the environment of `make test-vllm`.

    .venv-vllm/bin/python benchmarks/vllm_plugin.py             # all parts, each in a process of its own
    .venv-vllm/bin/python benchmarks/vllm_plugin.py --part speed
    .venv-vllm/bin/python benchmarks/vllm_plugin.py --part residuals --seconds 20 --result runs/trial.json  # a trial

Speed: tokens per second of decoding, SmolLM2-135M, float32, CPU, the same prompts for every side; vLLM without the
plugin and with it, in turns in one process; X-LoRA, and mixtures in one pass, beside plain LoRA of the same total rank;
residuals: what their option costs a batch without any, and a vector on all blocks and a chain of two linked residuals
(rank 8, 8 layers) in every row.
Parity: the grid of tests/vllm on a tiny random Llama and on SmolLM2, with its negative controls.

A part of speeds takes five minutes at most: rounds end early on a slow machine, not before the second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # vLLM compiles functions of its sampler
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ |= {"HF_HUB_OFFLINE": "1"}

RESULT = ROOT / "benchmarks" / "results" / "vllm_plugin.json"
SECONDS = 200.0  # of a part's measurements; engines and folders come on top
PARTS = ("speed", "mixtures", "routers", "residuals", "parity")
EXPERTS, RANK = 4, 8  # of the mixture; the plain LoRA has their product
RESIDUAL_LAYERS = (2, 6, 10, 14, 17, 20, 24, 28)  # of SmolLM2's 30 blocks
# vLLM knows an adapter by its number
IDS = ("science", "plain", "arrow", "spectr", "adapter0", "vector", "first", "second", "first+second")
PARITY_TOKENS = 6  # of every answer that is compared
PROMPT_TOKENS, NEW_TOKENS = 4, 12  # decoding: vLLM's CPU operators copy an adapter's weights for every token
WORKLOAD = {
    "model": "smollm2-135m",
    "dtype": "float32",
    "experts": EXPERTS,
    "rank": RANK,
    "prompt_tokens": PROMPT_TOKENS,
    "new_tokens": NEW_TOKENS,
    "clock": "wall",
    "seconds": SECONDS,
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def settings(options: dict[str, Any] | None) -> dict[str, Any]:
    """Of an engine; `options` None is vLLM without the plugin."""
    from loraplex.models.checkpoints.smollm2 import convert_smollm2

    chosen = {
        "model": str(convert_smollm2()),
        "dtype": "float32",
        "enforce_eager": True,
        "enable_lora": True,
        "max_lora_rank": EXPERTS * RANK,
        "max_loras": 2,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "block_size": 32,
        "num_gpu_blocks_override": 64,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    return chosen if options is None else {**chosen, "additional_config": {"loraplex": options}}


def write_folders(folder: Path) -> dict[str, Path]:
    """A plain adapter of the mixture's total rank, and a mixture of random experts with a random head."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from loraplex.bench.random_adapters import random_adapter, write_random_folders
    from loraplex.layers.base.modules import adaptable_modules
    from loraplex.models.checkpoints.smollm2 import convert_smollm2
    from loraplex.xlora.config import XLoraConfig
    from loraplex.xlora.formats.write_folder import write_mixture_folder
    from loraplex.xlora.head import ScalingHead

    config = AutoConfig.from_pretrained(convert_smollm2())
    with torch.device("meta"):
        shapes = adaptable_modules(AutoModelForCausalLM.from_config(config))
    plain = write_random_folders(shapes, folder, [EXPERTS * RANK], torch.float32)["adapter0"]
    experts = {str(i): random_adapter(shapes, RANK, torch.float32, i) for i in range(EXPERTS)}
    layers = len(experts["0"].layers)
    mixture = XLoraConfig(layerwise_scalings=True)
    head = ScalingHead(mixture, hidden_size=config.hidden_size, num_experts=EXPERTS, num_layers=layers)
    write_mixture_folder(
        folder / "science",
        layout="peft",
        config=mixture,
        hidden_size=config.hidden_size,
        head_state=head.state_dict(),
        experts=experts,
        base_model_name=None,
    )
    return {"plain": plain, "science": folder / "science", **write_routers(folder, experts)}


def write_routers(folder: Path, experts: dict[str, Any]) -> dict[str, Path]:
    """Mixtures of the same experts whose routers have no weights."""
    from loraplex import ArrowConfig, SpectrConfig
    from loraplex.routers.folder import write_router_folder
    from loraplex.routers.mixture import RoutedMixture
    from loraplex.routers.router import make_router

    for name, config in (("arrow", ArrowConfig(top_k=2)), ("spectr", SpectrConfig(top_k=2))):
        mixture = RoutedMixture(
            name=name,
            experts=tuple(experts),
            config=config,
            router=make_router(config, {}, len(experts)),
            modules=(),
            layers=(),
        )
        write_router_folder(folder / name, mixture, experts, base_model_name=None)
    return {name: folder / name for name in ("arrow", "spectr")}


def write_residuals(folder: Path) -> None:
    """A vector on the outputs of all blocks but the first, and two linked residuals; weak ones."""
    import torch
    from transformers import AutoConfig

    from loraplex.models.checkpoints.smollm2 import convert_smollm2
    from loraplex.residual import LinkedLayer, LinkedResidual, ResidualConfig, SteeringVector, write_residual
    from loraplex.residual.fingerprint import BaseFingerprint

    config = AutoConfig.from_pretrained(convert_smollm2())
    hidden, heads, draw = config.hidden_size, config.num_attention_heads, torch.Generator().manual_seed(0)
    vectors = {n: torch.randn(hidden, generator=draw) * 0.01 for n in range(1, config.num_hidden_layers)}
    write_residual(SteeringVector(vectors=vectors, base=None, site="block"), folder / "vector")
    base = BaseFingerprint(
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        vocab_size=config.vocab_size,
        num_heads=(heads,) * config.num_hidden_layers,
    )
    for name in ("first", "second"):
        layers = {
            layer: LinkedLayer(
                a=torch.randn(RANK, hidden, generator=draw) * hidden**-0.5,
                b=torch.randn(RANK, hidden, generator=draw) * 0.01,
                head_logits=torch.randn(RANK, heads, generator=draw),
            )
            for layer in RESIDUAL_LAYERS
        }
        write_residual(LinkedResidual(config=ResidualConfig(r=RANK), layers=layers, base=base), folder / name)


def tokens_per_s(llm: Any, path: Path | None, batch_size: int, times: int) -> float:
    """Of the median run."""
    clock = WORKLOAD["clock"]
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    prompts = [
        {"prompt_token_ids": [(7 * i + 13 * j) % 40000 + 10 for j in range(PROMPT_TOKENS)]} for i in range(batch_size)
    ]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    # a link of names is no path
    lora = None if path is None else LoRARequest(path.name, 1 + IDS.index(path.name), str(path))
    seconds = []
    for _ in range(times):
        start = CLOCKS[clock]()
        llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
        seconds.append(CLOCKS[clock]() - start)
    return batch_size * NEW_TOKENS / median(seconds)


def measure_speed(folders: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Base rows and plain LoRA, without the plugin and with it: the two engines in turns."""
    from vllm import LLM

    sides = {"vllm": LLM(**settings(None)), "plugin": LLM(**settings({}))}
    for results in side_by_side(sides, folders["plain"], WORKLOAD["seconds"]):
        yield {"without a mixture, tokens/s": results}


def rounds_within(most: int, seconds: float) -> Iterator[int]:
    """The numbers of rounds, as many as there is time for; two at least."""
    stop = time.monotonic() + seconds
    for i in range(most):
        if i > 1 and time.monotonic() > stop:
            return
        yield i


def side_by_side(sides: dict[str, Any], plain: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Base rows and plain LoRA in two engines, in turns; after each case what is known so far."""
    cases = [(kind, path, size) for size in (8, 1) for kind, path in (("base", None), ("plain", plain))]
    results = {}
    for kind, path, size in cases:
        found: dict[str, list[float]] = {side: [] for side in sides}
        for llm in sides.values():
            tokens_per_s(llm, path, size, 1)
        for i in rounds_within(4, seconds / len(cases)):
            for side in list(sides)[:: 1 if i % 2 else -1]:
                found[side].append(tokens_per_s(sides[side], path, size, 1))
        results[f"{kind}, batch {size}"] = {side: round(median(speeds), 1) for side, speeds in found.items()}
        yield results


def measure_mixtures(folders: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """X-LoRA beside base rows and plain LoRA of the same total rank, in one engine with the second cache."""
    from vllm import LLM

    kinds = {"base": None, "plain": folders["plain"], "x-lora": folders["science"]}
    for results in in_turns(LLM(**settings({"mixtures": True})), kinds, 3, WORKLOAD["seconds"]):
        yield {"with mixtures on, tokens/s": results}


def measure_routers(folders: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Mixtures in one pass beside base rows and plain LoRA of the same total rank, in one engine."""
    from vllm import LLM

    kinds = {"base": None, "plain": folders["plain"], "arrow": folders["arrow"], "spectr": folders["spectr"]}
    for results in in_turns(LLM(**settings({"routers": True}) | {"max_loras": 3}), kinds, 5, WORKLOAD["seconds"]):
        yield {"with routers on, tokens/s": results}


def measure_residuals(folders: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Batches without residuals, without the plugin and with all its options; then rows with residuals in it."""
    from vllm import LLM

    folder = folders["plain"].parent
    write_residuals(folder)
    options = {"residuals": True, "linked": 2, "attention": True, "attention_layers": RESIDUAL_LAYERS}
    sides = {
        "vllm": LLM(**settings(None)),
        "plugin": LLM(**settings(options | {"folder": str(folder), "any_path": True}) | {"max_loras": 3}),
    }
    for results in side_by_side(sides, folders["plain"], WORKLOAD["seconds"] / 2):
        yield {"without a residual, tokens/s": results}
    kinds = {"base": None, "vector": folder / "vector", "linked": folder / "first", "chain": Path("first+second")}
    for results in in_turns(sides["plugin"], kinds, 5, WORKLOAD["seconds"] / 2):
        yield {"with residuals on, tokens/s": results}


def in_turns(llm: Any, kinds: dict[str, Path | None], rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Tokens per second of each kind, medians over rounds; after each batch size what is known so far."""
    results: dict[str, Any] = {}
    for size in (8, 1):
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for path in kinds.values():
            tokens_per_s(llm, path, size, 1)
        for _ in rounds_within(rounds, seconds / 2):
            for kind, path in kinds.items():
                found[kind].append(tokens_per_s(llm, path, size, 1))
        results[f"batch {size}"] = {kind: round(median(speeds), 1) for kind, speeds in found.items()}
        yield results


def measure_parity(folders: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """The grid in one batch with base, adapter and linked rows, and both negative controls."""
    import torch

    from loraplex.models.checkpoints.loading import load_base_model
    from tests.vllm.worlds import grid_world, make_base

    bases = {
        "tiny Llama": lambda: make_base(initializer_range=0.1),
        "SmolLM2-135M": lambda: load_base_model("smollm2-135m", dtype=torch.float32, device="cpu")[0],
    }
    results: dict[str, Any] = {}
    for model, make in bases.items():
        found = compare(grid_world(folders["science"].parent / model, make()))
        results |= {f"{model}, {case}": numbers for case, numbers in found.items()}
        yield {"parity with PEFT": results}


def compare(world: Any) -> dict[str, Any]:
    """With PEFT's answers: how many tokens of how many are wrong, and how far log-probabilities are off."""
    import torch

    from loraplex.vllm_plugin import gates
    from tests.vllm.worlds import CHOICES, difference, engine, prompts, scaling_pass

    rows = list(zip(CHOICES, prompts(len(CHOICES)), strict=True))
    mixtures = [row for row in rows if row[0] and row[0].startswith("mix")]
    results: dict[str, Any] = {}

    def note(name: str, chosen: Any) -> None:
        found = difference(llm, world, chosen, PARITY_TOKENS)
        results[name] = {"tokens": found.num_tokens, "wrong": found.num_wrong, "largest difference": found.largest}

    sizes = {"max_loras": 16, "max_cpu_loras": 16, "enable_prefix_caching": False}
    with engine(world, {"mixtures": True}, **sizes) as llm:
        note("the grid, base, adapter and linked rows", rows)
        cache = scaling_pass(llm).cache
        copies, names = cache.copies, cache.names
        registry = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        cache.copies, cache.names = {name: registry[name] for name in copies}, {name: name for name in names}
        note("control: one shared cache", mixtures)
        cache.copies, cache.names = copies, names
        kept = gates.kept_scalings
        gates.kept_scalings = lambda scalings, config: torch.full_like(scalings, 1 / 3)
        note("control: uniform gates", mixtures)
        gates.kept_scalings = kept
    return results


def run_part(part: str, result: Path) -> None:
    from loraplex.bench.report import environment, package_version

    measure = {
        "speed": measure_speed,
        "mixtures": measure_mixtures,
        "routers": measure_routers,
        "residuals": measure_residuals,
        "parity": measure_parity,
    }[part]
    with tempfile.TemporaryDirectory() as folder:
        for results in measure(write_folders(Path(folder))):  # what is known so far
            content = json.loads(result.read_text()) if result.exists() else {"results": {}}
            here = environment()
            here["versions"]["vllm-cpu"] = package_version("vllm-cpu")
            if part in ("speed", "mixtures") or "environment" not in content:
                content |= {"environment": here, "workload": WORKLOAD}
            elif part != "parity":  # right answers are no machine's
                content.setdefault("measured apart", {})[part] = {**here, "clock": WORKLOAD["clock"]}
            content["results"] |= results
            result.parent.mkdir(parents=True, exist_ok=True)
            result.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(results, indent=2), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="one of them; default: all")
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: the process's own, on a machine that does other things too (with OMP_NUM_THREADS=1)",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a part's measurements")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    part, WORKLOAD["clock"], WORKLOAD["seconds"] = options.part, options.clock, options.seconds
    if part is not None:
        run_part(part, options.result)
        return 0
    settings = {"--clock": options.clock, "--seconds": options.seconds, "--result": options.result}
    command = [sys.executable, __file__, *(str(word) for pair in settings.items() for word in pair), "--part"]
    failed = [p for p in PARTS if subprocess.run([*command, p], check=False).returncode != 0]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
