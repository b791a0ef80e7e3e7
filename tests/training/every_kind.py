"""A job of every kind that can be trained, for tests of what holds for all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraplex.adapters.config import LoraConfig
from loraplex.residual.modules import ResidualConfig
from loraplex.residual.positions import parse_positions
from loraplex.residual.reft import ReftConfig
from loraplex.training import AdapterJob
from tests.tiny_models import random_peft_adapter, tiny_model
from tests.training.tiny_jobs import pairs, rewarded, tiny_job, tiny_tokenizer, write_records

TARGETS = ("q_proj", "v_proj", "down_proj")
STEPS = 4
RESIDUALS = ("residual", "residual-after", "loreft", "loreft-after", "loreft-dpo")
DORAS = ("dora", "dora-gated", "dora-dpo")


def jobs_of_every_kind(folder: Path, *, without: Sequence[str] = ()) -> list[AdapterJob]:
    """On a tiny Llama; `without` names kinds that are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        tiny_job(folder, name, form, **{"max_steps": STEPS, "eval_every": 2} | options)
        for name, (form, options) in _kinds(folder).items()
        if name not in without
    ]
    assert {job.name for job in jobs}.isdisjoint(without)
    return jobs


def _kinds(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """By name, the form of the records and the job's options."""
    chosen = {"data": write_records(folder / "pairs.jsonl", pairs()), "loss": "dpo", "batch_size": 3}
    one_by_one = {"batch_size": 1, "gradient_accumulation": 3}
    reward = {"data": write_records(folder / "rewarded.jsonl", rewarded()), "loss": "reward"}
    start = random_peft_adapter(tiny_model("llama"), folder / "start", targets=TARGETS, r=4, lora_alpha=8)
    after = {"after": [(start, 0.5)]}
    turn = tuple(tiny_tokenizer()("assistant\n", add_special_tokens=False)["input_ids"])
    loreft, residual = _loreft(), {"lora": None, "residual": ResidualConfig(r=3, alpha=6.0)}
    return {
        "dropout": ("messages", {"lora": _lora(lora_dropout=0.3), "patience": 9, "gradient_accumulation": 2}),
        "dora": ("prompt", {"lora": _lora(use_dora=True), "lora_plus_ratio": 4.0}),
        "dora-gated": ("messages", {"lora": _lora(use_dora=True), "gates_before_user": 0.25}),
        "dora-dpo": ("messages", {"lora": _lora(use_dora=True), **chosen}),
        "rslora-plus": ("text", {"lora": _lora(use_rslora=True), "lora_plus_ratio": 8.0, "weight_decay": 0.1}),
        "pissa": ("messages", {"lora": _lora(lora_dropout=0.2), "start": "pissa"}),
        "olora-dpo": ("messages", {"lora": _lora(), "start": "olora", **chosen, "turns": "last"}),
        "alora": ("messages", {"lora": _lora(alora_invocation_tokens=turn)}),
        "gated": ("messages", {"lora": _lora(), "gates_before_user": "dropout", "keep_best": True}),
        # The second and third micro-batch have one pair: of two processes, one has none.
        "dpo": ("messages", {"lora": _lora(lora_dropout=0.2), "init_from": start, **chosen, **one_by_one}),
        "reward": ("messages", {"lora": _lora(), **reward}),
        "ends": ("text", {"lora": _lora(target_modules=("embed_tokens", "lm_head")), "best_by": "exact_match"}),
        "after": ("prompt", {"lora": _lora(), **after}),
        "residual": ("messages", residual),
        "residual-after": ("prompt", residual | after),
        "loreft": ("prompt", loreft),
        "loreft-after": ("prompt", loreft | after),
        "loreft-dpo": ("messages", loreft | chosen),
    }


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options)


def _loreft() -> dict[str, Any]:
    return {"lora": None, "reft": ReftConfig(r=2, positions=parse_positions("f2+l3"))}
