"""What a checkpoint belongs to: the jobs with their data and first weights, and the base model."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from loraplex.training.adapters.job_state import JobState
from loraplex.training.config import AdapterJob

_NOT_COMPARED = ("name", "data", "eval_data", "init_from", "lora", "residual", "after")  # compared by content
_SAMPLE = 4096  # bytes of every base parameter


def run_fingerprint(states: Sequence[JobState], base: PreTrainedModel) -> dict[str, Any]:
    """Everything that decides what a run learns, in JSON's types. Call it before the first step."""
    return {
        "base model": base_fingerprint(base),
        "names": [state.job.name for state in states],
        "jobs": {state.job.name: _job_fingerprint(state) for state in states},
    }


def base_fingerprint(base: PreTrainedModel) -> dict[str, Any]:
    """What tells base models apart."""
    return {"class": type(base).__name__, "dtype": str(base.dtype), "weights": _weights_digest(base)}


def _job_fingerprint(state: JobState) -> dict[str, Any]:
    options = {
        field.name: getattr(state.job, field.name) for field in fields(AdapterJob) if field.name not in _NOT_COMPARED
    }
    weights = state.parameters.flat.detach().cpu().numpy()
    return options | {
        **_settings(state.job),
        "content of data": state.data.digest,
        "content of after": state.frozen.digest,
        "num_steps": state.data.num_steps,
        "first weights": hashlib.sha256(weights.tobytes()).hexdigest(),
    }


def _settings(job: AdapterJob) -> dict[str, Any]:
    if job.lora is not None:
        return {"lora": asdict(job.lora)}
    assert job.residual is not None, "a job trains one of the two"
    return {"residual": asdict(job.residual)}


def _weights_digest(base: PreTrainedModel) -> str:
    """Of the names, shapes and first values of all parameters: a whole model would take seconds to read."""
    digest = hashlib.sha256()
    for name, parameter in base.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        start = parameter.detach().reshape(-1)[: _SAMPLE // parameter.element_size()]
        digest.update(start.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
