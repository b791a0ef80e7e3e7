"""A LoRA adapter's settings, under PEFT's names, with PEFT's rules for ranks, scalings and targets."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loraplex.adapters.contents import ContentsConfig
from loraplex.adapters.patterns import check_number_of_matches, check_patterns, find_matches
from loraplex.errors import ConfigError
from loraplex.validation import is_finite, is_whole, quoted

ALL_LINEAR = "all-linear"
MAX_RANK = 1 << 20  # what a module can have is checked against its shape

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The settings of PEFT's LoraConfig that loraplex honours exactly (PEFT 0.21, `LoraConfig`)."""

    r: int = 8
    lora_alpha: float = 8
    target_modules: tuple[str, ...] | str | None = None  # suffixes | regular expression | "all-linear"
    target_parameters: tuple[str, ...] | None = None  # suffixes of parameters' paths: stacked experts, routers
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
    contents: ContentsConfig = field(default_factory=ContentsConfig)  # what comes beside the factors
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranks_and_alphas()
        self._check_targets()
        self._check_parameters()
        if not (is_finite(self.lora_dropout) and 0 <= self.lora_dropout <= 1):
            raise ConfigError(f"lora_dropout is {quoted(self.lora_dropout)}; it must be a number from 0 to 1.")
        self._check_invocation()

    def ranks_of(self, paths: Sequence[str]) -> dict[str, int]:
        """By module path, the rank: from rank_pattern's first key that matches, else r. Raises ConfigError."""
        return _resolve("rank_pattern", self.rank_pattern, paths, self.r)

    def alphas_of(self, paths: Sequence[str]) -> dict[str, float]:
        """By module path, the alpha: from alpha_pattern's first matching key, else lora_alpha. Raises ConfigError."""
        return _resolve("alpha_pattern", self.alpha_pattern, paths, self.lora_alpha)

    def scalings_of(self, paths: Sequence[str]) -> dict[str, float]:
        """By module path, the LoRA scaling: alpha/r; rsLoRA (arXiv 2312.03732): alpha/sqrt(r). Raises ConfigError."""
        ranks, alphas = self.ranks_of(paths), self.alphas_of(paths)
        return {path: alphas[path] / (math.sqrt(rank) if self.use_rslora else rank) for path, rank in ranks.items()}

    def rank_of(self, path: str) -> int:
        """The rank of one module; `ranks_of` is faster for many."""
        return self.ranks_of((path,))[path]

    def alpha_of(self, path: str) -> float:
        """The alpha of one module."""
        return self.alphas_of((path,))[path]

    def scaling_of(self, path: str) -> float:
        """The LoRA scaling of one module."""
        return self.scalings_of((path,))[path]

    def _check_types(self) -> None:
        for option in ("use_rslora", "use_dora", "fan_in_fan_out"):
            if not isinstance(getattr(self, option), bool):
                raise ConfigError(f"{option} is {quoted(getattr(self, option))}; it must be True or False.")
        for option in ("base_model_name_or_path", "task_type"):
            value = getattr(self, option)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{option} is {quoted(value)}; it must be a text or None.")
        for option in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, option)
            if not (isinstance(patterns, Mapping) and all(isinstance(key, str) for key in patterns)):
                raise ConfigError(f"{option} is {quoted(patterns)}; it must map regular expressions to numbers.")
        for option in ("target_modules", "exclude_modules", "layers_pattern", "target_parameters"):
            value = getattr(self, option)
            if isinstance(value, str) and option in ("target_modules", "exclude_modules"):
                continue
            if value is not None and not _is_tuple_of(value, lambda name: isinstance(name, str)):
                raise ConfigError(f"{option} is {quoted(value)}; it must be a tuple of names.")
        for option in ("layers_to_transform", "alora_invocation_tokens"):
            value = getattr(self, option)
            if value is not None and not _is_tuple_of(value, lambda number: is_whole(number) and 0 <= number < 2**31):
                raise ConfigError(f"{option} is {quoted(value)}; it must be a tuple of whole numbers from 0 on.")

    def _check_ranks_and_alphas(self) -> None:
        ranks = {"r": self.r} | {f"rank_pattern[{quoted(key)}]": rank for key, rank in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if not (is_whole(rank) and 1 <= rank <= MAX_RANK):
                raise ConfigError(
                    f"{name} is {quoted(rank)}; a rank must be a whole number of at least 1, and {MAX_RANK} at most."
                )
        alphas = {"lora_alpha": self.lora_alpha}
        alphas |= {f"alpha_pattern[{quoted(key)}]": alpha for key, alpha in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if not is_finite(alpha):
                raise ConfigError(f"{name} is {quoted(alpha)}; an alpha must be a finite number of float32's range.")
        for option in ("rank_pattern", "alpha_pattern"):
            check_patterns(option, [_suffix_pattern(pattern) for pattern in getattr(self, option)])

    def _check_targets(self) -> None:
        for option in ("target_modules", "exclude_modules"):
            value = getattr(self, option)
            if isinstance(value, str):
                check_patterns(option, [value])
        check_patterns("layers_pattern", [index_pattern(pattern) for pattern in self.layers_pattern or ()])
        if isinstance(self.target_modules, str) and (self.layers_to_transform or self.layers_pattern):
            raise ConfigError(
                "layers_to_transform and layers_pattern need a list of target_modules, but target_modules "
                f"is {quoted(self.target_modules)}. Write the layers into the regular expression, or list the "
                "modules."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"layers_pattern is {quoted(self.layers_pattern)} but layers_to_transform is None; set both or neither."
            )

    def _check_parameters(self) -> None:
        """PEFT's `ParamWrapper` adapts a parameter by plain LoRA only."""
        if not self.target_parameters:
            return
        for option, value in (("use_dora", self.use_dora), ("fan_in_fan_out", self.fan_in_fan_out)):
            if value:
                raise ConfigError(
                    f"target_parameters is {quoted(self.target_parameters)} and {option} is True, which can't be "
                    f"combined (neither can they in PEFT). Set {option} to False."
                )
        if self.alora_invocation_tokens is not None:
            raise ConfigError(
                f"target_parameters is {quoted(self.target_parameters)} and alora_invocation_tokens is set, which "
                "can't be combined (neither can they in PEFT). Adapt modules (target_modules) by aLoRA."
            )

    def _check_invocation(self) -> None:
        tokens = self.alora_invocation_tokens
        if tokens is None:
            return
        if not tokens:
            raise ConfigError("alora_invocation_tokens is empty; give at least one token id, or None for plain LoRA.")
        if self.use_dora:
            raise ConfigError("use_dora and alora_invocation_tokens can't be combined (neither can they in PEFT).")


def index_pattern(layers_pattern: str) -> str:
    """PEFT's expression for a module in one of several layers; its group "idx" is the layer's number."""
    return rf"(?:^|.*?\.){layers_pattern}\.(?P<idx>\d+)\."


def _resolve(option: str, patterns: Mapping[str, Value], paths: Sequence[str], default: Value) -> dict[str, Value]:
    """PEFT's `get_pattern_key`: a key is a regular expression for the path or for its last components."""
    check_number_of_matches(option, len(patterns), len(paths))
    if not all(map(str.isascii, paths)):  # some patterns are slower for them
        check_patterns(option, list(map(_suffix_pattern, patterns)), paths)
    found: dict[str, Value] = {}
    left = list(paths)
    for pattern, value in patterns.items():
        if not left:
            break
        found |= dict.fromkeys(find_matches(option, _suffix_pattern(pattern), left, "match"), value)
        left = [path for path in left if path not in found]
    found |= {path: patterns.get(path, default) for path in left}  # a path need not match itself as an expression
    return {path: found[path] for path in paths}


def _suffix_pattern(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _is_tuple_of(value: object, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and all(map(accepts, value))
