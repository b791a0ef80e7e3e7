"""How long a training step takes here: each expert alone, and all of them in shared batches."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from examples.science.settings import Settings
from examples.science.steps import write_jobs


def measure(settings: Settings, num_steps: int) -> None:
    """Write <output>/speed.json: seconds a step by expert; prints what one batch of all experts takes beside."""
    write_jobs(settings)
    domains = list(settings.experts)
    found = {domain: _seconds_a_step(settings, [domain], num_steps) for domain in domains}
    together = _seconds_a_step(settings, domains, num_steps)
    (settings.output / "speed.json").write_text(json.dumps({k: round(v, 2) for k, v in found.items()}) + "\n")
    print(f"one by one {sum(found.values()):.2f} s a step of each, in one batch {together:.2f} s: {found}")


def _seconds_a_step(settings: Settings, domains: list[str], num_steps: int) -> float:
    """The difference of a run of many steps and a run of one, so that loading doesn't count."""
    return (_seconds(settings, domains, 1 + num_steps) - _seconds(settings, domains, 1)) / num_steps


def _seconds(settings: Settings, domains: list[str], steps: int) -> float:
    data, lora = settings.output / "data", settings.lora
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model", settings.model, "--dtype", settings.dtype, "--output", str(Path(folder) / "run")]
        words += ["--steps", str(steps), "--rank", str(lora.rank), "--targets", ",".join(lora.targets)]
        words += ["--batch-size", str(lora.batch_size), "--eval-fraction", "0", "--no-plots", "--no-prompt-centroids"]
        words += ["--gates-before-user", lora.gates_before_user]
        for domain in domains:
            words += ["--data", f"{domain}={data / domain}.train.jsonl"]
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "loraplex.cli.train", "adapters", *words], check=True, capture_output=True
        )
        return time.monotonic() - began
