"""Draw docs/images/speed.svg, the README's chart, from benchmarks/results: python scripts/draw_speed.py

A test compares the numbers that the picture was drawn from, which it holds, with those of the result files.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "images" / "speed.svg"
DTYPE = "bfloat16"
OURS, THEIRS, PLAIN = "#0072B2", "#8c959f", "#d0d7de"
INK, SOFT = "#1f2328", "#57606a"

Panel = dict[str, Any]  # its title, and the bars: tokens/s by name, the peer's first


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def panels() -> list[Panel]:
    """What the chart shows of the result files."""
    batch = next(case for case in read("mixed_batch")["results"] if (case["dtype"], case["rows"]) == (DTYPE, 8))
    peers = next(case for case in read("engine_peers")["results"] if case["case"] == f"vllm:{DTYPE}")
    mixture = next(case for case in read("xlora")["results"] if (case["question"], case["dtype"]) == ("peft", DTYPE))
    training = next(case for case in read("training")["results"] if case["dtype"] == DTYPE)["tokens_per_s"]
    shown = {
        "generate: 8 rows, 8 adapters": {
            "PEFT, mixed batch": batch["tokens_per_s"]["peft"],
            "transformers, no adapters": batch["tokens_per_s"]["base"],
            "loraplex": batch["tokens_per_s"]["loraplex"],
        },
        "engine: 8 requests, 8 adapters": {
            f"vLLM {peers['versions']['vllm']}, CPU build": peers["tokens_per_s"]["vllm"],
            "loraplex": peers["tokens_per_s"]["loraplex"],
        },
        "one X-LoRA mixture of four": {
            "PEFT": mixture["tokens_per_s"]["peft"],
            "loraplex": mixture["tokens_per_s"]["loraplex"],
        },
        "training four adapters": {
            "PEFT, one by one": max(training["peft"], training["peft_eager"]),
            "loraplex": training["loraplex"],
        },
    }
    return [{"title": title, "bars": bars} for title, bars in shown.items()]


def machine() -> str:
    files = [read(name)["environment"] for name in ("mixed_batch", "engine_peers", "xlora", "training")]
    processors = sorted({f"{file['cores']} cores of an {file['cpu']}" for file in files})
    return f"{', '.join(processors)}, no GPU; SmolLM2-135M in {DTYPE}; {max(file['date'] for file in files)}"


def draw_panel(axes: Axes, panel: Panel) -> None:
    names, speeds = list(panel["bars"]), list(panel["bars"].values())
    for at, (name, speed) in enumerate(zip(names, speeds, strict=True)):
        color = OURS if name == "loraplex" else PLAIN if "no adapters" in name else THEIRS
        axes.barh(-at, speed, color=color, height=0.72)
        text = f"{speed:.0f}" if speed >= 30 else f"{speed:.1f}"
        axes.text(speed + max(speeds) * 0.02, -at, text, va="center", fontsize=10, color=INK)
        if name == "loraplex":
            times = f"{speed / speeds[0]:.1f}x"
            axes.text(max(speeds) * 1.19, -at, times, va="center", fontsize=12, color=OURS, weight="bold")
    axes.set_yticks([-at for at in range(len(names))], names, fontsize=10, color=INK)
    axes.set_title(panel["title"], loc="left", fontsize=11, color=INK, weight="bold")
    axes.set_xlim(0, max(speeds) * 1.4)
    axes.set_ylim(-len(names) + 0.4, 0.6)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PICTURE)
    output = parser.parse_args().output
    shown = panels()
    plt.rcParams["svg.hashsalt"] = "loraplex"  # the same file every time
    figure, grid = plt.subplots(2, 2, figsize=(10.4, 4.1), layout="constrained")
    for axes, panel in zip(grid.flat, shown, strict=True):
        draw_panel(axes, panel)
    figure.suptitle("Tokens/s beside others in the same run", x=0.012, ha="left", fontsize=13, weight="bold", color=INK)
    figure.supxlabel(machine(), x=0.012, ha="left", fontsize=9.5, color=SOFT)
    figure.savefig(output, facecolor="white", metadata={"Date": None, "Description": json.dumps(shown)})


if __name__ == "__main__":
    main()
