"""How much memory do loaded adapters take, beyond their own bytes?

python benchmarks/memory.py                 # 32 adapters in bf16 and fp32; Linux only

Fresh processes load the base model alone, or with all adapters, and then generate with one row for each adapter (the
base rows in the first). The high-water marks of resident memory start after the base model is loaded, so that what
its loading took does not hide what the adapters take. Both sides generate the same number of tokens: activations
cancel in the difference, which is divided by the adapters' bytes.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import console, print_table, save
from random_adapters import write_random_folders

from loraplex import MultiLoraModel
from loraplex.models.checkpoints.loading import DTYPES

RANKS = (8, 16, 4, 32, 8, 8, 8, 8)


def peak_bytes() -> int:
    """The process's high-water mark of resident memory."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024


def start_new_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # adapters must not hide in what loading the base left free in the heap
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM to what is resident now


def measure_here(model_name: str, dtype: str, folder: Path | None, rows: int, new_tokens: int) -> dict[str, int]:
    """In a fresh process: peaks after loading and after generating, and the adapters' bytes; no folder is the base."""
    model = MultiLoraModel.from_pretrained(model_name, dtype=dtype)
    start_new_peak()
    paths = {} if folder is None else {path.name: path for path in sorted(folder.iterdir())}
    for name, path in paths.items():
        model.load_adapter(name, path)
    loaded = peak_bytes()
    ids = torch.randint(1000, 40000, (rows, 32), generator=torch.Generator().manual_seed(0))
    names = list(paths) or [None]
    adapters = [names[row % len(names)] for row in range(rows)]
    with torch.no_grad():
        model.generate(
            ids,
            torch.ones_like(ids),
            adapters=adapters,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
    adapter_bytes = sum(state.num_bytes for state in model.adapters())
    return {"loaded": loaded, "generated": peak_bytes(), "adapter_bytes": adapter_bytes}


def measure(options: argparse.Namespace, dtype: str, folder: Path | None) -> dict[str, int]:
    """`measure_here` in a fresh process."""
    arguments = [sys.executable, __file__, "--here", dtype, "--model", options.model, "--rows", str(options.rows)]
    arguments += ["--new-tokens", str(options.new_tokens)] + ([] if folder is None else ["--folder", str(folder)])
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"the measured process failed:\n{run.stderr}")
    figures: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return figures


def compare(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """The medians of both sides over some repetitions, and what the adapters add for each byte of theirs."""
    ranks = [RANKS[i % len(RANKS)] for i in range(options.adapters)]
    file_dtype = options.file_dtype or dtype
    with tempfile.TemporaryDirectory() as folder:
        model = MultiLoraModel.from_pretrained(options.model, dtype=dtype)
        write_random_folders(model.adaptable.shapes, Path(folder), ranks, DTYPES[file_dtype])
        del model
        runs = [(measure(options, dtype, None), measure(options, dtype, Path(folder))) for _ in range(options.repeats)]
    adapter_bytes = runs[0][1]["adapter_bytes"]
    result: dict[str, Any] = {"dtype": dtype, "file_dtype": file_dtype, "adapter_bytes": adapter_bytes}
    for stage in ("loaded", "generated"):
        base, full = (median(run[side][stage] for run in runs) for side in (0, 1))
        result[stage] = {"base_peak": base, "peak": full, "added_per_adapter_byte": (full - base) / adapter_bytes}
    return result


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--file-dtype", default=None, choices=list(DTYPES), help="of the files; default: the model's")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--here", default=None, help=argparse.SUPPRESS)  # the dtype that this process measures
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.here is not None:
        print(json.dumps(measure_here(options.model, options.here, options.folder, options.rows, options.new_tokens)))
        return
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("this benchmark reads /proc/self, which only Linux has")
    results = []
    for dtype in options.dtypes:
        console.print(f"{options.adapters} adapters in {dtype}, {options.repeats} times ...")
        results.append(compare(options, dtype))
    print_table(
        f"{options.model}: {options.adapters} adapters, 7 targets, ranks {RANKS}",
        ["case", "adapters MB", "base peak MB", "peak MB", "added / adapters' bytes"],
        [
            [
                f"{r['dtype']}, {stage}",
                f"{r['adapter_bytes'] / 1e6:.0f}",
                f"{r[stage]['base_peak'] / 1e6:.0f}",
                f"{r[stage]['peak'] / 1e6:.0f}",
                f"{r[stage]['added_per_adapter_byte']:.2f}",
            ]
            for r in results
            for stage in ("loaded", "generated")
        ],
    )
    if not options.no_save:
        workload = {key: value for key, value in vars(options).items() if key not in ("here", "folder", "no_save")}
        save("memory", workload | {"ranks": RANKS, "targets": "all 7"}, results)


if __name__ == "__main__":
    main()
