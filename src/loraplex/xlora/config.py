"""A mixture's settings, under PEFT's names and those that only the original package has."""

from dataclasses import dataclass

from loraplex.errors import ConfigError
from loraplex.validation import is_finite, is_whole, quoted

MAX_DEPTH = 256
MAX_SIZE = 1 << 17
MIN_TEMPERATURE = 1e-6  # below, a logit divided by it is infinite in float32

# What the scaling head's weights were made for; all other settings can be changed afterwards.
HEAD_SETTINGS = frozenset(
    ("xlora_depth", "xlora_size", "xlora_dropout_p", "layerwise_scalings", "use_bias", "enable_relu_and_dropout")
)


@dataclass(frozen=True, kw_only=True)
class XLoraConfig:
    """How a mixture's scaling head is built and what its scalings do (X-LoRA, arXiv 2402.07148).

    The defaults are PEFT's. `use_bias` and `enable_relu_and_dropout` exist in the original package only.
    `enable_softmax` and `enable_softmax_topk` may be on together: the second softmax then runs over the
    first's results, as in PEFT, which flattens the scalings.
    """

    xlora_depth: int = 1  # linear layers in the scaling head
    xlora_size: int = 2048  # width of the hidden layers; of no effect at depth 1
    xlora_dropout_p: float = 0.2  # after each hidden layer, in training only
    layerwise_scalings: bool = False  # other scalings in each LoRA layer; False: the same in all
    enable_softmax: bool = True  # over the experts
    softmax_temperature: float = 1.0  # the softmax is that of logits / temperature
    top_k_lora: int | None = None  # keep the k largest scalings of each token and layer, and no others
    enable_softmax_topk: bool = False  # softmax over the kept scalings, without temperature
    scaling_pass_value: float | None = 0.0  # the experts' scalings in the scaling pass; None is 1 / experts
    global_scaling_weight: float = 1.0  # multiplies what every expert adds
    use_trainable_adapters: bool = False  # training changes the experts too
    use_bias: bool = True  # in all linear layers of the head, the last one included
    enable_relu_and_dropout: bool = True  # after each hidden layer; False: neither of them

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()
        if self.enable_softmax_topk and self.top_k_lora is None:
            raise ConfigError(
                "enable_softmax_topk is True, but top_k_lora is None: there is no top k to take the softmax of. "
                "Set top_k_lora to 1 or more, or enable_softmax_topk to False."
            )

    def pass_value(self, num_experts: int) -> float:
        """The scaling that every expert has in the scaling pass: scaling_pass_value, or 1 / num_experts."""
        return 1 / num_experts if self.scaling_pass_value is None else float(self.scaling_pass_value)

    def check_num_experts(self, num_experts: int) -> None:
        """Raise ConfigError unless a mixture with these settings can have `num_experts` experts."""
        if num_experts < 1:
            raise ConfigError(f"the mixture has {num_experts} experts; give at least 1.")
        if self.top_k_lora is not None and self.top_k_lora > num_experts:
            raise ConfigError(
                f"top_k_lora is {self.top_k_lora}, but the mixture has {num_experts} experts. Set it to 1 to "
                f"{num_experts}, or to None to keep all of them."
            )

    def _check_types(self) -> None:
        for option in (
            *("layerwise_scalings", "enable_softmax", "enable_softmax_topk"),
            *("use_trainable_adapters", "use_bias", "enable_relu_and_dropout"),
        ):
            if not isinstance(getattr(self, option), bool):
                raise ConfigError(f"{option} is {quoted(getattr(self, option))}; it must be True or False.")
        for option in ("xlora_dropout_p", "softmax_temperature", "global_scaling_weight"):
            if not is_finite(getattr(self, option)):
                raise ConfigError(f"{option} is {quoted(getattr(self, option))}; it must be a finite number.")
        if self.scaling_pass_value is not None and not is_finite(self.scaling_pass_value):
            raise ConfigError(
                f"scaling_pass_value is {quoted(self.scaling_pass_value)}; it must be a finite number, or None for "
                "1 / the number of experts."
            )

    def _check_ranges(self) -> None:
        for option, most in (("xlora_depth", MAX_DEPTH), ("xlora_size", MAX_SIZE)):
            value = getattr(self, option)
            if not (is_whole(value) and 1 <= value <= most):
                raise ConfigError(f"{option} is {quoted(value)}; it must be a whole number from 1 to {most}.")
        if self.top_k_lora is not None and not (is_whole(self.top_k_lora) and self.top_k_lora >= 1):
            raise ConfigError(
                f"top_k_lora is {quoted(self.top_k_lora)}; it must be a whole number, 1 or more, or None to keep all "
                "experts."
            )
        if not 0 <= self.xlora_dropout_p < 1:
            raise ConfigError(f"xlora_dropout_p is {self.xlora_dropout_p!r}; it must be at least 0 and below 1.")
        if self.softmax_temperature < MIN_TEMPERATURE:
            raise ConfigError(
                f"softmax_temperature is {self.softmax_temperature!r}; it must be above 0, at least "
                f"{MIN_TEMPERATURE:g}: 1 changes nothing, less is sharper."
            )
