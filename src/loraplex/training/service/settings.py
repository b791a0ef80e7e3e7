"""What a server that trains allows, and what a client asks for when it begins."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from loraplex.errors import ConfigError, RequestError
from loraplex.validation import check_least, is_finite, is_whole, quoted

MAX_SEED = 2**63 - 1
LORA_ALPHA = 32.0  # of every LoRA, as the Tinker API has it: scaling 1 at rank 32


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """How much of the machine training may take."""

    max_runs: int = 16  # training runs in memory; further ones wait until a place is free
    max_rank: int = 128
    tokens_per_forward: int = 1024  # padded tokens of a pass; larger batches are computed in parts
    max_datum_tokens: int = 4096  # of one datum, which is computed as a whole
    max_request_tokens: int = 65536  # of all data of one forward_backward
    max_queued: int = 256  # requests of a run that are taken and not done
    max_queued_bytes: int = 2**26  # of them, as they were sent
    max_all_queued_bytes: int = 2**28  # of all runs; of one key's runs, half of it
    max_kept: int = 2048  # of a run's results, kept for clients that ask again
    max_kept_bytes: int = 2**26  # of them
    idle_s: float = 300.0  # a client that isn't heard of for so long leaves its place; its state stays on disk
    snapshot_steps: int = 10  # optimizer steps between snapshots; what came since is computed again after a crash
    snapshot_bytes: int = 2**26  # of requests since the last snapshot, the same

    def __post_init__(self) -> None:
        check_least(self, dict.fromkeys(vars(self), 1))


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A training run: whose it is, and its LoRA."""

    run_id: str
    owner: str  # the key's id
    base_model: str
    rank: int
    seed: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    target_modules: tuple[str, ...]
    user_metadata: Mapping[str, Any] = field(default_factory=dict)
    created: float = 0.0  # seconds since 1970

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "RunSettings":
        """Raises KeyError or TypeError for what as_json didn't write."""
        return cls(**{**content, "target_modules": tuple(content["target_modules"])})


@dataclass(frozen=True, kw_only=True)
class AdamParams:
    """One optimizer step's settings of AdamW."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0  # 0 clips nothing

    def __post_init__(self) -> None:
        for name, least, most in _ADAM_RANGES:
            value = getattr(self, name)
            if not (is_finite(value) and least <= value <= most):
                raise RequestError(f"{name} is {quoted(value)}; it must be a number from {least:g} to {most:g}.")
        if self.beta1 >= 1 or self.beta2 >= 1:
            raise RequestError(f"beta1 is {self.beta1} and beta2 is {self.beta2}; both must be below 1.")


_ADAM_RANGES = (
    ("learning_rate", 0.0, 100.0),
    ("beta1", 0.0, 1.0),
    ("beta2", 0.0, 1.0),
    ("eps", 0.0, 1.0),
    ("weight_decay", 0.0, 1e6),
    ("grad_clip_norm", 0.0, 1e30),
)


def check_lora(rank: object, seed: object, limits: ServiceLimits) -> None:
    """Raise RequestError for a rank or a seed that isn't possible."""
    if not (is_whole(rank) and 1 <= rank <= limits.max_rank):  # type: ignore[operator]
        raise RequestError(f"rank is {quoted(rank)}; 1 to {limits.max_rank} are possible (max_rank).")
    if seed is not None and not (is_whole(seed) and 0 <= seed <= MAX_SEED):  # type: ignore[operator]
        raise RequestError(f"seed is {quoted(seed)}; it must be a whole number from 0 to {MAX_SEED}, or left out.")


def check_base(name: str, served: str) -> None:
    """Raise ConfigError for another base model than the server's."""
    if name != served:
        raise ConfigError(f"base_model is {quoted(name)}, but this server has {served!r}. Ask for that one.")
