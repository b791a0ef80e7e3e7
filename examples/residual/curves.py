"""Learning curves of behaviours.py: held-out loss by step and by CPU minute, linked residuals beside LoRAs.

    python examples/residual/curves.py --measure 6   # CPU seconds of a step, each kind alone; writes step_cost.json
    python examples/residual/curves.py               # draws the curves in behaviours.json

behaviours.py trains all adapters in the same batches, so its CPU time doesn't tell what each costs. `--measure` trains
one adapter of each kind alone, for one step and for some more, without evaluations: the difference, by step, is the
price of a step of 8 records. Minutes of training are steps times that price.
"""

import argparse
import json
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from behaviours import BEHAVIOURS, KINDS, job, write_data
from facts import facts
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from loraplex import MultiLoraModel
from loraplex.bench.report import environment
from loraplex.training import EvaluationConfig, TrainConfig, train_adapters

HERE = Path(__file__).parent
COLORS = {"residual": "tab:blue", "lora": "tab:orange"}
LABELS = {"residual": "linked residual, 174,150 parameters", "lora": "LoRA on q and v, 172,800 parameters"}
TITLES = {"source": "answers end with a source line", "refuse": "medical questions are refused"}


def train_cost(model: MultiLoraModel, kind: str, steps: int, output: Path) -> float:
    """CPU seconds that `steps` steps of one adapter take, with everything around them."""
    settings = Namespace(steps=steps, rate=5e-3, lora_rate=5e-3)
    nothing = EvaluationConfig(eval_fraction=0)
    alone = replace(job("refuse", kind, output / "data", settings), eval_data=None, evaluation=nothing)
    config = TrainConfig(output=output / f"{kind}-{steps}", resume=False, plots=False)
    start = time.process_time()
    train_adapters(model, model.tokenizer, jobs=[alone], config=config)
    return time.process_time() - start


def measure(steps: int, options: Namespace) -> None:
    """Write what a step of each kind costs."""
    write_data(options.output / "data", *facts())
    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    seconds = {}
    for kind in KINDS:
        few = train_cost(model, kind, 1, options.output)
        seconds[kind] = (train_cost(model, kind, 1 + steps, options.output) - few) / steps
        Console().print(f"{kind}: {seconds[kind]:.2f} CPU seconds a step of 8 records")
    content = {
        "environment": environment(),
        "model": options.model,
        "dtype": options.dtype,
        "steps": steps,
        "cpu_seconds_a_step": seconds,
    }
    (HERE / "step_cost.json").write_text(json.dumps(content, indent=2) + "\n")


def draw(losses: dict[str, Any], seconds: dict[str, float], path: Path) -> None:
    """Held-out loss of both behaviours, over steps and over CPU minutes."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(len(BEHAVIOURS), 2, sharey=True)
    for row, behaviour in zip(panels, BEHAVIOURS, strict=True):
        row[0].set_title(TITLES[behaviour], loc="left", fontsize=10)
        row[0].set_ylabel("held-out loss (nats a token)", fontsize=9)
        for kind in KINDS:
            steps, values = losses[f"{behaviour}-{kind}"]
            _curve(row[0], steps, values, kind, "steps")
            _curve(row[1], [step * seconds[kind] / 60 for step in steps], values, kind, "CPU minutes of training")
        for axes in row:
            axes.set_xlim(left=0)
    panels[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _curve(axes: Axes, across: list[float], values: list[float], kind: str, label: str) -> None:
    axes.plot(across, values, "o-", color=COLORS[kind], markersize=4, label=LABELS[kind])
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.2, 0.5, 1.0], ["0.1", "0.2", "0.5", "1"])
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=int, default=None, help="measure the cost of so many steps first")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("runs/curves"), help="folder for what --measure trains")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/residual-curves.png"))
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure, options)
    losses = json.loads((HERE / "behaviours.json").read_text())["held_out_losses"]
    seconds = json.loads((HERE / "step_cost.json").read_text())["cpu_seconds_a_step"]
    draw(losses, seconds, options.picture)


if __name__ == "__main__":
    main()
