"""The settings of mixtures that need no second pass, one class for each kind of router."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from loraplex.errors import ConfigError
from loraplex.validation import is_finite, is_whole, quoted

MIN_TEMPERATURE = 1e-6

Activation = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class ArrowConfig:
    """Arrow (arXiv 2405.11157): a token goes to the experts whose strongest input direction it points along.

    As PEFT's `create_arrow_model`: the scores |x . v|, of which `top_k` are kept, become gates by a softmax of
    score / temperature. v is the first right singular vector of an expert's B A, by 15 steps of the power method from a
    random start that `rng_seed` chooses. With `general_experts`, the mean of their A and B is subtracted from each
    expert's A and B (general knowledge subtraction; PEFT's use_gks).
    """

    top_k: int = 3  # at most: a module may have fewer experts
    temperature: float = 1.0
    general_experts: tuple[str, ...] = ()  # loaded adapters
    rng_seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.top_k, self.temperature)
        if not (is_whole(self.rng_seed) and 0 <= self.rng_seed < 2**63):
            raise ConfigError(f"rng_seed is {quoted(self.rng_seed)}; it must be a whole number from 0 on.")
        if not isinstance(self.general_experts, tuple) or not all(isinstance(e, str) for e in self.general_experts):
            raise ConfigError(f"general_experts is {quoted(self.general_experts)}; it must be a tuple of names.")


@dataclass(frozen=True, kw_only=True)
class SpectrConfig:
    """SpectR (arXiv 2504.03454): a token goes to the experts that change it most.

    The scores |B A x| = sqrt(u' B'B u) with u = A x, of which `top_k` are kept (None: all), become gates by a softmax
    of score / temperature.
    """

    top_k: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_choice(self.top_k, self.temperature)


@dataclass(frozen=True, kw_only=True)
class LinearRouterConfig:
    """A trained linear router in each LoRA layer: logits R x + bias.

    "softmax": of logits / temperature, over all experts, the `top_k` largest, or the fewest whose probabilities add up
    to `top_p`; those that are kept add up to 1. "sigmoid": each expert by itself; `top_k` keeps the largest. `shared`:
    all LoRA layers whose inputs have one width share one R and bias.
    """

    activation: Activation = "softmax"
    top_k: int | None = None
    top_p: float | None = None
    temperature: float = 1.0
    shared: bool = False

    def __post_init__(self) -> None:
        check_choice(self.top_k, self.temperature)
        if not isinstance(self.shared, bool):
            raise ConfigError(f"shared is {quoted(self.shared)}; it must be True or False.")
        if self.activation not in get_args(Activation):
            raise ConfigError(f"activation is {quoted(self.activation)}; choose one of {list(get_args(Activation))}.")
        if self.top_p is not None and not (is_finite(self.top_p) and 0 < self.top_p <= 1):
            raise ConfigError(f"top_p is {quoted(self.top_p)}; it must be above 0 and at most 1, or None.")
        if self.top_p is not None and (self.top_k is not None or self.activation != "softmax"):
            raise ConfigError("top_p is for a softmax over all experts. Leave top_k out, or top_p.")

    def weight_widths(self, widths: Sequence[int]) -> list[int]:
        """The inputs of each R: those of every LoRA layer, or, shared, each width once."""
        return list(dict.fromkeys(widths)) if self.shared else list(widths)


@dataclass(frozen=True, kw_only=True)
class StaticRouterConfig:
    """Gates that are the same for all tokens: one for each expert, or one for each expert in each LoRA layer."""

    gates: tuple[float, ...] | tuple[tuple[float, ...], ...]  # [experts] or [LoRA layers][experts]

    def __post_init__(self) -> None:
        rows: Sequence[object] = [self.gates] if self.gates and not isinstance(self.gates[0], tuple) else self.gates
        if not isinstance(self.gates, tuple) or not rows:
            raise ConfigError(f"gates is {quoted(self.gates)}; it must be a tuple with a gate for each expert.")
        for row in rows:
            if not isinstance(row, tuple) or not all(is_finite(gate) for gate in row):
                raise ConfigError(f"gates has {quoted(row)}; gates must be finite numbers.")
            if len(row) != len(rows[0]):  # type: ignore[arg-type]
                raise ConfigError("gates has LoRA layers with different numbers of experts.")


RouterConfig = ArrowConfig | SpectrConfig | LinearRouterConfig | StaticRouterConfig


def check_choice(top_k: int | None, temperature: float) -> None:
    """Raise ConfigError unless these say how scores become gates."""
    if top_k is not None and not (is_whole(top_k) and top_k >= 1):
        raise ConfigError(f"top_k is {quoted(top_k)}; it must be a whole number, 1 or more, or None for all experts.")
    if not (is_finite(temperature) and temperature >= MIN_TEMPERATURE):
        raise ConfigError(
            f"temperature is {quoted(temperature)}; it must be above 0, at least {MIN_TEMPERATURE:g}: 1 changes "
            "nothing, less is sharper."
        )
