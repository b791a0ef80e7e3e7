"""Trains a tiny mixture: what test_resume starts as a program of its own, to kill it.

python -m tests.training.mixture.run_tiny FOLDER
"""

import sys
from pathlib import Path

import torch

from loraplex import XLoraConfig
from loraplex.training import TrainResult, train_mixture
from tests.training.mixture.tiny_mixture import NAME, tiny_config, tiny_mixture, tiny_sources

STEPS = 40
DROPOUT = XLoraConfig(xlora_depth=2, xlora_size=32, xlora_dropout_p=0.3, layerwise_scalings=True)


def run(folder: Path, output: Path, config: XLoraConfig = DROPOUT) -> TrainResult:
    """Dropout in head and experts, accumulation, shares, early stopping: everything that a checkpoint has to know."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_mixture(folder, config)
    settings = tiny_config(
        output,
        max_steps=STEPS,
        warmup_steps=5,
        patience=50,
        weight_decay=0.1,
        gradient_accumulation=2,
        batch_size=4,
        expert_dropout=0.1,
        load_balance_weight=0.1,
        sparsity_weight=0.01,
        hidden_cache_bytes=200_000,  # not enough for all
        checkpoint_every=6,
    )
    return train_mixture(model, NAME, tiny_sources(folder), settings)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[1]) / "out")
