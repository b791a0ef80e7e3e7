"""How long a training step takes here: each expert alone, and all of them in shared batches."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from examples.science.settings import Settings
from examples.science.steps import write_jobs


def measure(settings: Settings, num_steps: int, domains: list[str]) -> None:
    """Write <output>/speed.json: CPU seconds a step by expert; print what one batch of all of them takes beside.

    With one thread these are the seconds of a machine that has nothing else to do; two threads take some 0.6 of it.
    """
    write_jobs(settings)
    path = settings.output / "speed.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    found = {domain: round(_seconds_a_step(settings, [domain], num_steps), 2) for domain in domains}
    path.write_text(json.dumps(known | found) + "\n")
    together = _seconds_a_step(settings, domains, num_steps)
    print(f"one by one {sum(found.values()):.2f} CPU s for a step of each, in one batch {together:.2f}: {found}")


def _seconds_a_step(settings: Settings, domains: list[str], num_steps: int) -> float:
    """The difference of a run of many steps and a run of one, so that loading doesn't count."""
    return (_seconds(settings, domains, 1 + num_steps) - _seconds(settings, domains, 1)) / num_steps


def _seconds(settings: Settings, domains: list[str], steps: int) -> float:
    """CPU seconds of a training with the first records of each domain."""
    lora = settings.lora
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model", settings.model, "--dtype", settings.dtype, "--output", str(Path(folder) / "run")]
        words += ["--steps", str(steps), "--rank", str(lora.rank), "--targets", ",".join(lora.targets)]
        words += ["--batch-size", str(lora.batch_size), "--eval-fraction", "0", "--no-plots", "--no-prompt-centroids"]
        words += ["--gates-before-user", lora.gates_before_user, "--checkpoint-every", "1000"]
        for domain in domains:
            lines = (settings.output / "data" / f"{domain}.train.jsonl").read_text("utf-8").splitlines(keepends=True)
            data = Path(folder) / f"{domain}.jsonl"
            data.write_text("".join(lines[: steps * lora.batch_size]), "utf-8")
            words += ["--data", f"{domain}={data}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "loraplex.cli.train", "adapters", *words]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
