"""How long a training step takes here: each expert alone, and all of them in shared batches."""

import json
import tempfile
import time
from pathlib import Path

import torch

from examples.science.columns import load_model
from examples.science.settings import Settings
from loraplex import LoraConfig, MultiLoraModel
from loraplex.training import AdapterJob, EvaluationConfig, StepsConfig, TrainConfig, train_adapters


def measure(settings: Settings, num_steps: int, domains: list[str]) -> None:
    """Write <output>/speed.json: CPU seconds a step by expert; print what one batch of all of them takes beside.

    With one thread these are the seconds of a machine that has nothing else to do.
    """
    torch.set_num_threads(1)
    path = settings.output / "speed.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    model = load_model(settings)
    _seconds(model, settings, domains[:1], 1)  # what a first step compiles and measures doesn't count
    found = {}
    for domain in domains:
        found[domain] = round(_seconds_a_step(model, settings, [domain], num_steps), 2)
        path.write_text(json.dumps(known | found) + "\n")
        print(f"{domain}: {found[domain]} CPU s a step", flush=True)
    if len(domains) > 1:
        together = _seconds_a_step(model, settings, domains, num_steps)
        print(f"one by one {sum(found.values()):.2f} CPU s for a step of each, in one batch {together:.2f}")


def _seconds_a_step(model: MultiLoraModel, settings: Settings, domains: list[str], num_steps: int) -> float:
    """The difference of a run of many steps and a run of one, so that what comes before doesn't count."""
    return (_seconds(model, settings, domains, 1 + num_steps) - _seconds(model, settings, domains, 1)) / num_steps


def _seconds(model: MultiLoraModel, settings: Settings, domains: list[str], steps: int) -> float:
    """CPU seconds of a training with the first records of each domain."""
    lora = settings.lora
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            AdapterJob(
                name=domain,
                data=_first_records(settings, domain, steps * lora.batch_size, Path(folder)),
                lora=LoraConfig(r=lora.rank, lora_alpha=2 * lora.rank, target_modules=lora.targets),
                steps=StepsConfig(max_steps=steps, batch_size=lora.batch_size, max_length=lora.max_length),
                evaluation=EvaluationConfig(eval_fraction=0.0),
                gates_before_user=lora.gates_before_user,
            )
            for domain in domains
        ]
        run = TrainConfig(output=Path(folder) / "run", plots=False, prompt_centroids=False, progress=False)
        began = time.process_time()
        train_adapters(model, model.tokenizer, jobs=jobs, config=run)
        return time.process_time() - began


def _first_records(settings: Settings, domain: str, count: int, folder: Path) -> Path:
    lines = (settings.output / "data" / f"{domain}.train.jsonl").read_text("utf-8").splitlines(keepends=True)
    path = folder / f"{domain}.jsonl"
    path.write_text("".join(lines[:count]), "utf-8")
    return path
