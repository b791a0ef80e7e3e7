"""How fast are decoding steps of other architectures than Llama's: the engine beside transformers' generate.

python benchmarks/decode_shapes.py                                    # 8 rows of each shape, bfloat16
python benchmarks/decode_shapes.py --shapes gemma3-1b --threads 1

Random weights in the shapes of real models, with a smaller vocabulary. Tokens a second beyond the first of each row, by
the clock and by the processor's time (which neighbours on the machine disturb less); the median of alternating rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from common import console, print_table, save

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams

VOCAB = 32768
COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": None}
SHAPES = {
    "qwen3-0.6b": lambda: transformers.Qwen3Config(
        **COMMON,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "gemma3-1b": lambda: transformers.Gemma3TextConfig(
        **COMMON,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    ),
}

Run = Callable[[int], None]  # decodes so many tokens of each row


def speeds(run: Run, options: argparse.Namespace) -> tuple[float, float]:
    """Tokens a second by the clock, and by processor time."""

    def spent(num_tokens: int) -> tuple[float, float]:
        start = time.perf_counter(), time.process_time()
        run(num_tokens)
        return time.perf_counter() - start[0], time.process_time() - start[1]

    first, all_of_them = spent(1), spent(options.new_tokens)
    num_tokens = options.rows * (options.new_tokens - 1)
    wall, cpu = (num_tokens / (b - a) for a, b in zip(first, all_of_them, strict=True))
    return wall, cpu


def make_runs(base: transformers.PreTrainedModel, engine: Engine, ids: torch.Tensor) -> dict[str, Run]:
    def generate(num_tokens: int) -> None:
        with torch.inference_mode():
            base.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens)

    def run_engine(num_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        results = engine.generate([Request(row, sampling=sampling) for row in ids.tolist()])
        assert all(len(result.token_ids) == num_tokens for result in results), "an answer ended early"

    return {"generate": generate, "engine": run_engine}


def measure(shape: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By side, medians of tokens a second."""
    torch.manual_seed(0)
    config = SHAPES[shape]()
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    served = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    ids = torch.randint(100, VOCAB, (options.rows, options.prompt_tokens), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[tuple[float, float]]] = {"generate": [], "engine": []}
    with Engine(MultiLoraModel(served), EngineConfig(prefix_cache=False, max_length=1024)) as engine:
        for _ in range(options.rounds):
            for side, run in make_runs(plain, engine, ids).items():
                found[side].append(speeds(run, options))
    return {
        side: {"wall": statistics.median(w for w, _ in pairs), "cpu": statistics.median(c for _, c in pairs)}
        for side, pairs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for shape in options.shapes:
        found = measure(shape, options)
        results.append({"shape": shape, "tokens_per_s": found})
        console.print(f"{shape}: {found}")
    table = [
        [r["shape"], side, *(f"{speed:.1f}" for speed in sides.values())]
        for r in results
        for side, sides in r["tokens_per_s"].items()
    ]
    print_table(f"{options.rows} rows, bfloat16: tokens a second", ["shape", "side", "clock", "processor"], table)
    if not options.no_save:
        save("decode_shapes", vars(options), results)


if __name__ == "__main__":
    main()
