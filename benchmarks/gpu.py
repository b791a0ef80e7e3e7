"""Builds, checks and times everything that runs on a GPU, beside its peers, and prints one table.

python benchmarks/gpu.py                            # on a GPU with 80 GB: 8B and 1B shapes, into results/gpu.json
python benchmarks/gpu.py --shapes 1B --sections kernels decode
python benchmarks/gpu.py --tiny --device cpu        # no times of any worth: every line once, in triton's interpreter

Times are medians of CUDA events, on random weights and inputs, with the L2 cache flushed before each run. Peers: a bmm
over gathered weights, PEFT's mixed batch and X-LoRA, and the kernels of polylora where it is installed.
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_timing import Figure

SECTIONS = ("errors", "kernels", "decode", "mixture", "peft")
NO_DEVICE = 3  # exit status


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=("8B", "1B"), default=["8B", "1B"])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is for --tiny alone: triton's interpreter would take days for the rest")
    return options


def obstacle(device: str) -> str | None:
    """Why nothing can be measured here."""
    import torch

    from loraplex.kernels.triton.available import triton_runs

    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device. Run it on a machine with one, or try: --tiny --device cpu"
    if not triton_runs(torch.device(device), torch.bfloat16):
        return "the Triton kernels can't run here: install the package triton (it comes with CUDA builds of torch)"
    return None


def measure(options: argparse.Namespace) -> "list[Figure]":
    import torch
    from gpu_decode import Sizes, against_peft, decode_steps, mixture_steps
    from gpu_kernels import decode_kernels, errors
    from gpu_models import SHAPES
    from gpu_timing import Timer

    timer = Timer(torch.device(options.device), 1 if options.tiny else options.rounds)
    tiny = options.tiny
    figures = []
    if "errors" in options.sections:
        figures += errors(timer, *((2, 40) if tiny else (200, 5000)))
    if "kernels" in options.sections:
        rows, rank, hidden, copied = (3, 4, 64, 2**16) if tiny else (64, 16, 4096, 2**30)
        figures += decode_kernels(timer, rows=rows, rank=rank, hidden=hidden, copied_bytes=copied)
    dtype = torch.float32 if tiny else torch.bfloat16
    all_sizes = [
        Sizes(
            dtype=dtype,
            rows=2 if tiny else 64,
            ranks=ranks,
            peft_rows=4 if tiny else 32,
            prompt_tokens=4 if tiny else 64,
            new_tokens=8 if tiny else 64,
        )
        for ranks in (((4,),) if tiny else ((16,), (8, 16, 32, 64)))
    ]
    for shape in [SHAPES["tiny"]] if tiny else [SHAPES[name] for name in options.shapes]:
        if "decode" in options.sections:
            figures += [figure for sizes in all_sizes for figure in decode_steps(timer, shape, sizes)]
        for section, run in (("mixture", mixture_steps), ("peft", against_peft)):
            if section in options.sections:
                figures += run(timer, shape, all_sizes[0])
    return figures


def main() -> int:
    options = parse()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    reason = obstacle(options.device)
    if reason is not None:
        print(f"benchmarks/gpu.py: {reason}", file=sys.stderr)
        return NO_DEVICE
    from loraplex.bench.report import print_table, save_json

    figures = measure(options)
    told = {True: "holds", False: "MISSED", None: ""}
    print_table(
        "random weights" + (", tiny, in triton's interpreter: no times of any worth" if options.tiny else ""),
        ["shape", "what", "value", "bar", ""],
        [[f.shape, f.what, f.text, f.bar, told[f.holds]] for f in figures],
    )
    workload = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    save_json(options.output, workload, [asdict(figure) for figure in figures])
    return 1 if any(figure.holds is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
