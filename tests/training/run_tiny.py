"""Trains tiny jobs or a tiny mixture: what test_resume and test_ranks start as a program, to kill it or run it twice.

python -m tests.training.run_tiny FOLDER [adapters | diverging | mixture | mixture and experts | router | ...]
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState

from loraplex.adapters.config import LoraConfig
from loraplex.errors import TrainingError
from loraplex.routers.config import LinearRouterConfig
from loraplex.training import AdapterJob, TrainConfig, TrainResult, train_adapters, train_mixture
from loraplex.training.core import checks
from loraplex.xlora.config import XLoraConfig
from tests.tiny_models import tiny_model
from tests.training.every_kind import DORAS, RESIDUALS, jobs_of_every_kind
from tests.training.mixture.tiny_mixture import NAME, tiny_config, tiny_mixture, tiny_sources
from tests.training.routers.tiny_router import NAME as ROUTER
from tests.training.routers.tiny_router import TEACHER, XLORA, tiny_router
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer

STEPS = 40
NOT_SHARDED = (*RESIDUALS, *DORAS)
DROPOUT = XLoraConfig(xlora_depth=2, xlora_size=32, xlora_dropout_p=0.3, layerwise_scalings=True)


def jobs_in(folder: Path) -> list[AdapterJob]:
    """Dropout, accumulation, early stopping and different lengths: everything that a checkpoint has to know."""
    dropout = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.2)
    return [
        tiny_job(folder, "a", lora=dropout, max_steps=STEPS, warmup_steps=5, patience=50, weight_decay=0.1),
        tiny_job(folder, "b", "prompt", max_steps=STEPS, batch_size=3, gradient_accumulation=2, schedule="linear"),
        tiny_job(folder, "c", "text", max_steps=20, schedule="constant", max_grad_norm=None),
    ]


def run(folder: Path, output: Path, **options: Any) -> list[TrainResult]:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(output=output, checkpoint_every=6, plots=False, tokens_per_forward=150, **options)
    base = tiny_model("llama")
    results = train_adapters(base, tiny_tokenizer(), jobs=jobs_in(folder), config=config)
    if config.fsdp:
        held = sum(parameter.to_local().numel() for parameter in base.parameters())  # type: ignore[operator]
        total = sum(parameter.numel() for parameter in base.parameters())
        assert held < 0.6 * total, f"a process holds {held} of {total} weights: they are not shared out"
    return results


def run_kinds(folder: Path, output: Path, *, without: Sequence[str] = (), **options: Any) -> list[TrainResult]:
    """A job of every kind, on a base model whose output layer is its embedding."""
    torch.set_num_threads(1)
    jobs = jobs_of_every_kind(folder, without=without)
    config = TrainConfig(output=output, plots=False, tokens_per_forward=400, **options)
    base = tiny_model("llama")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    return train_adapters(base, tiny_tokenizer(), jobs=jobs, config=config)


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


def run_mixture(folder: Path, output: Path, config: XLoraConfig = DROPOUT) -> list[TrainResult]:
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
    return [train_mixture(model, NAME, tiny_sources(folder), settings)]


def run_experts(folder: Path, output: Path) -> list[TrainResult]:
    """The mixture with experts that train too and take part in the scaling pass."""
    return run_mixture(folder, output, replace(DROPOUT, use_trainable_adapters=True, scaling_pass_value=0.5))


def run_router(folder: Path, output: Path, **options: Any) -> list[TrainResult]:
    """A linear router that an X-LoRA teaches, with dropout, accumulation, regularizers and early stopping."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_router(folder, LinearRouterConfig(top_k=2), teacher=XLORA if "teacher" in options else None)
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
        z_loss_weight=0.01,
        first_weights="noise",
        hidden_cache_bytes=200_000,  # not enough for all
        checkpoint_every=6,
        **options,
    )
    return [train_mixture(model, ROUTER, tiny_sources(folder), settings)]


RUNS: dict[str, Callable[[Path, Path], list[TrainResult]]] = {
    "adapters": run,
    "sharded": lambda folder, output: run(folder, output, fsdp=True),
    "kinds": run_kinds,
    "sharded kinds": lambda folder, output: run_kinds(
        folder, output, without=NOT_SHARDED, fsdp=True, gradient_checkpointing=True
    ),
    "diverging": run_diverging,
    "mixture": run_mixture,
    "mixture and experts": run_experts,
    "router": lambda folder, output: run_router(folder, output, teacher=TEACHER, logit_kl_weight=0.5),
    "router and experts": lambda folder, output: run_router(folder, output, train_experts=True),
}


if __name__ == "__main__":
    results = RUNS[(*sys.argv[2:], "adapters")[0]](Path(sys.argv[1]), Path(sys.argv[1]) / "out")
    rank = PartialState().process_index
    finished = {result.name: [result.finished, result.num_steps] for result in results}
    Path(sys.argv[1], f"finished-{rank}.json").write_text(json.dumps(finished))
