"""What is worth keeping: experts of a lower rank, mixtures without copies of them, scores: at most 40 MB."""

import json
import shutil
from pathlib import Path

import torch

from examples.science.layout import expert_folder, full_folder, mixture_folder
from examples.science.settings import Settings
from loraplex.adapters.linking.combination import Combination
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.models.convert.linking import save_linked

LIMIT_BYTES = 40 * 10**6
SCORES = ("scores.json", "baselines.json", "table.md", "data/facts.json")


def lower_ranks(settings: Settings) -> None:
    """Write each expert's closest update of rank `kept_rank`, by a singular value decomposition."""
    for domain in settings.experts:
        combination = Combination(method="svd", rank=settings.lora.kept_rank)
        adapters = {domain: full_folder(settings, domain)}
        save_linked(domain, expert_folder(settings, domain), adapters, combination, overwrite=True)
        print(f"{domain}: rank {settings.lora.rank} to {settings.lora.kept_rank}", flush=True)


def ship(settings: Settings, target: Path, *, joint: bool) -> None:
    """Copy adapters in bfloat16, the mixtures' own files, scores and pictures to `target`.

    Raises SystemExit if they are more than 40 MB together: lower `kept_rank`.
    """
    for domain in settings.experts:
        folder = mixture_folder(settings, "X-LoRA") / domain if joint else expert_folder(settings, domain)
        write_adapter(read_adapter(folder), target / "adapters" / domain, torch.bfloat16, overwrite=True)
    for column, name in (("X-LoRA", "xlora"), ("router", "router")):
        folder = target / "mixtures" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in mixture_folder(settings, column).iterdir():
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    for name in SCORES:
        if (settings.output / name).exists():
            shutil.copyfile(settings.output / name, target / Path(name).name)
    if (settings.output / "gates").exists():
        ignored = shutil.ignore_patterns("empty")
        shutil.copytree(settings.output / "gates", target / "gates", dirs_exist_ok=True, ignore=ignored)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(json.dumps({"folder": str(target), "megabytes": round(size / 1e6, 1)}))
    if size > LIMIT_BYTES:
        raise SystemExit(f"{target} has {size / 1e6:.1f} MB; at most {LIMIT_BYTES / 1e6:.0f}. Lower lora.kept_rank.")
