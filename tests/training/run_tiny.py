"""Trains two tiny jobs: what test_resume and test_ranks start as a program of its own, to kill it or run it twice.

python -m tests.training.run_tiny FOLDER [diverging]
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState

from loraplex.adapters.config import LoraConfig
from loraplex.errors import TrainingError
from loraplex.training import AdapterJob, TrainConfig, TrainResult, train_adapters
from loraplex.training.core import checks
from tests.tiny_models import tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer

STEPS = 40


def jobs_in(folder: Path) -> list[AdapterJob]:
    """Dropout, accumulation, early stopping and different lengths: everything that a checkpoint has to know."""
    dropout = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.2)
    return [
        tiny_job(folder, "a", lora=dropout, max_steps=STEPS, warmup_steps=5, patience=50, weight_decay=0.1),
        tiny_job(folder, "b", "prompt", max_steps=STEPS, batch_size=3, gradient_accumulation=2, schedule="linear"),
        tiny_job(folder, "c", "text", max_steps=20, schedule="constant", max_grad_norm=None),
    ]


def run(folder: Path, output: Path) -> list[TrainResult]:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(output=output, checkpoint_every=6, plots=False, tokens_per_forward=150)
    return train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=jobs_in(folder), config=config)


def run_diverging(folder: Path, output: Path) -> list[TrainResult]:
    """Job "bad" has no finite loss or gradients in its second step; returns all results."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    head = LoraConfig(r=4, lora_alpha=8, target_modules=("lm_head",))
    options: dict[str, Any] = {"max_grad_norm": None, "eval_fraction": 0, "lora": head}
    with patch.object(checks, "MAX_LEARNING_RATE", 1e39):
        jobs = [tiny_job(folder, "good"), tiny_job(folder, "bad", learning_rate=1e37, **options)]
        config = TrainConfig(output=output, checkpoint_every=3, plots=False)
        try:
            return train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=jobs, config=config)
        except TrainingError as error:
            return list(error.results)


if __name__ == "__main__":
    train = run_diverging if "diverging" in sys.argv[2:] else run
    results = train(Path(sys.argv[1]), Path(sys.argv[1]) / "out")
    rank = PartialState().process_index
    finished = {result.name: [result.finished, result.num_steps] for result in results}
    Path(sys.argv[1], f"finished-{rank}.json").write_text(json.dumps(finished))
