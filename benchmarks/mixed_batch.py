"""How fast is a batch whose rows all use different adapters, against PEFT's mixed batch and against no adapters?

python benchmarks/mixed_batch.py            # 8 rows in bf16 and fp32, 32 rows in bf16
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from adapters import peft_with_adapters, write_random_adapters
from common import alternate, console, medians, print_table, save

from loraplex import MultiLoraModel
from loraplex.models.checkpoints.loading import load_base_model

RANKS = (8, 16, 4, 32, 8, 8, 8, 8)
PROMPT_TOKENS = 32


def measure(model_name: str, dtype: str, num_rows: int, new_tokens: int, rounds: int) -> dict[str, float]:
    """Medians of tokens/s of base, PEFT and loraplex, alternating in one process."""
    ranks = [RANKS[i % len(RANKS)] for i in range(num_rows)]
    with tempfile.TemporaryDirectory() as folder:
        paths = write_random_adapters(load_base_model(model_name, dtype=dtype, device="cpu")[0], Path(folder), ranks)
        peft_model = peft_with_adapters(load_base_model(model_name, dtype=dtype, device="cpu")[0], paths)
        plain, _ = load_base_model(model_name, dtype=dtype, device="cpu")
        ours = MultiLoraModel.from_pretrained(model_name, dtype=dtype)
        for name, path in paths.items():
            ours.load_adapter(name, path)
    names = list(paths)
    ids = torch.randint(1000, 40000, (num_rows, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
    }

    def timed(run) -> float:
        start = time.perf_counter()
        out = run()
        assert out.shape == (num_rows, PROMPT_TOKENS + new_tokens), out.shape
        return num_rows * new_tokens / (time.perf_counter() - start)

    with torch.no_grad():
        figures = alternate(
            {
                "base": lambda: timed(lambda: plain.generate(ids, **inputs)),
                "peft": lambda: timed(lambda: peft_model.generate(input_ids=ids, adapter_names=names, **inputs)),
                "loraplex": lambda: timed(lambda: ours.generate(ids, adapters=names, **inputs)),
            },
            rounds,
        )
    return medians(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cases", nargs="+", default=["bfloat16:8", "float32:8", "bfloat16:32"])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    results = []
    for case in options.cases:
        dtype, rows = case.split(":")
        console.print(f"{rows} rows, {rows} adapters, {dtype} ...")
        speeds = measure(options.model, dtype, int(rows), options.new_tokens, options.rounds)
        results.append({"dtype": dtype, "rows": int(rows), "tokens_per_s": speeds})
        console.print(", ".join(f"{side} {speed:.0f} tokens/s" for side, speed in speeds.items()))
    print_table(
        f"{options.model}: {options.new_tokens} new tokens, one adapter a row, 7 targets, ranks {RANKS}",
        ["case", "no adapters", "PEFT", "loraplex", "loraplex / PEFT", "loraplex / none"],
        [
            [
                f"{r['dtype']}, {r['rows']} rows",
                *(f"{r['tokens_per_s'][k]:.0f}" for k in ("base", "peft", "loraplex")),
                f"{r['tokens_per_s']['loraplex'] / r['tokens_per_s']['peft']:.2f}",
                f"{r['tokens_per_s']['loraplex'] / r['tokens_per_s']['base']:.2f}",
            ]
            for r in results
        ],
    )
    if not options.no_save:
        workload = vars(options) | {"ranks": RANKS, "prompt_tokens": PROMPT_TOKENS, "targets": "all 7"}
        save("mixed_batch", workload, results)


if __name__ == "__main__":
    main()
