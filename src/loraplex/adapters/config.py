"""A LoRA adapter's settings, under PEFT's names, with PEFT's rules for ranks, scalings and targets."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from loraplex.errors import ConfigError

ALL_LINEAR = "all-linear"

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The settings of PEFT's LoraConfig that loraplex honours exactly (PEFT 0.21, `LoraConfig`)."""

    r: int = 8
    lora_alpha: float = 8
    target_modules: tuple[str, ...] | str | None = None  # suffixes | regular expression | "all-linear"
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # the first key that matches counts
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0  # training only
    fan_in_fan_out: bool = False  # of no effect here: a module's own class tells how it stores its weight
    alora_invocation_tokens: tuple[int, ...] | None = None
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranks_and_alphas()
        self._check_targets()
        if not (_is_number(self.lora_dropout) and 0 <= self.lora_dropout <= 1):
            raise ConfigError(f"lora_dropout is {self.lora_dropout!r}; it must be a number from 0 to 1.")
        self._check_invocation()

    def rank_of(self, path: str) -> int:
        """The rank of the module at `path`: from rank_pattern's first key that matches, else r."""
        return _resolve(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """The alpha of the module at `path`: from alpha_pattern's first key that matches, else lora_alpha."""
        return _resolve(self.alpha_pattern, path, self.lora_alpha)

    def scaling_of(self, path: str) -> float:
        """The LoRA scaling of the module at `path`: alpha/r; rsLoRA (arXiv 2312.03732): alpha/sqrt(r)."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def _check_types(self) -> None:
        for option in ("use_rslora", "use_dora", "fan_in_fan_out"):
            if not isinstance(getattr(self, option), bool):
                raise ConfigError(f"{option} is {getattr(self, option)!r}; it must be True or False.")
        for option in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, option)
            if not (isinstance(patterns, Mapping) and all(isinstance(key, str) for key in patterns)):
                raise ConfigError(f"{option} is {patterns!r}; it must map regular expressions to numbers.")
        for option in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, option)
            if isinstance(value, str) and option != "layers_pattern":
                continue
            if value is not None and not _is_tuple_of(value, lambda name: isinstance(name, str)):
                raise ConfigError(f"{option} is {value!r}; it must be a tuple of names.")
        for option in ("layers_to_transform", "alora_invocation_tokens"):
            value = getattr(self, option)
            if value is not None and not _is_tuple_of(value, lambda number: _is_whole(number) and number >= 0):
                raise ConfigError(f"{option} is {value!r}; it must be a tuple of whole numbers of at least 0.")

    def _check_ranks_and_alphas(self) -> None:
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if not (_is_whole(rank) and rank >= 1):
                raise ConfigError(f"{name} is {rank!r}; a rank must be a whole number of at least 1.")
        alphas = {"lora_alpha": self.lora_alpha}
        alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if not (_is_number(alpha) and math.isfinite(alpha)):
                raise ConfigError(f"{name} is {alpha!r}; an alpha must be a finite number.")
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, option):
                _check_pattern(option, rf"(.*\.)?({pattern})$")

    def _check_targets(self) -> None:
        for option in ("target_modules", "exclude_modules"):
            value = getattr(self, option)
            if isinstance(value, str):
                _check_pattern(option, value)
        for pattern in self.layers_pattern or ():
            _check_pattern("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")
        if isinstance(self.target_modules, str) and (self.layers_to_transform or self.layers_pattern):
            raise ConfigError(
                "layers_to_transform and layers_pattern need a list of target_modules, but target_modules "
                f"is {self.target_modules!r}. Write the layers into the regular expression, or list the "
                "modules."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"layers_pattern is {self.layers_pattern!r} but layers_to_transform is None; set both or neither."
            )

    def _check_invocation(self) -> None:
        tokens = self.alora_invocation_tokens
        if tokens is None:
            return
        if not tokens:
            raise ConfigError("alora_invocation_tokens is empty; give at least one token id, or None for plain LoRA.")
        if self.use_dora:
            raise ConfigError("use_dora and alora_invocation_tokens can't be combined (neither can they in PEFT).")


def _resolve(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """PEFT's `get_pattern_key`: a key is a regular expression for the path or for its last components."""
    for pattern, value in patterns.items():
        if _suffix_pattern(pattern).match(path):
            return value
    return patterns.get(path, default)  # a path that doesn't match itself as a regular expression


@lru_cache(maxsize=65536)  # a pattern may hold one key for each module; `re` itself keeps only 512
def _suffix_pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _check_pattern(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{option} holds {pattern!r}, which is not a regular expression: {error}.") from error


def _is_tuple_of(value: object, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and all(map(accepts, value))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
