"""What an adapter may bring beside the factors of its modules: weights in the place of the base model's own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from loraplex.errors import ConfigError
from loraplex.validation import is_whole, quoted

Bias = Literal["none", "all", "lora_only"]
Start = Literal["nothing", "pissa", "olora"]
MAX_TOKEN_ROWS = 1 << 20  # of one embedding; more are a whole embedding

_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True, kw_only=True)
class ContentsConfig:
    """The settings of PEFT's LoraConfig that say so (PEFT 0.21, `set_additional_trainable_modules`)."""

    bias: Bias = "none"  # which biases of the base were trained too
    modules_to_save: tuple[str, ...] = ()  # names, or ends of names, of modules that come whole
    # By the name, or the end of the name, of an embedding: the tokens whose rows come; "" is the input embedding.
    token_rows: Mapping[str, tuple[int, ...]] | None = None
    ensure_weight_tying: bool = False  # what embedding and output layer share in the base they share in the adapter
    lora_bias: bool = False  # lora_B has a bias
    start: Start = "nothing"  # of the base's weights, which training took out of them and PEFT takes out at every load

    def __post_init__(self) -> None:
        if self.bias not in get_args(Bias):
            raise ConfigError(f"bias is {quoted(self.bias)}; it must be one of {list(get_args(Bias))}.")
        for option in ("ensure_weight_tying", "lora_bias"):
            if not isinstance(getattr(self, option), bool):
                raise ConfigError(f"{option} is {quoted(getattr(self, option))}; it must be True or False.")
        names = [*self.modules_to_save, *(name for name in self.token_rows or () if name)]
        for name in names:
            if not (isinstance(name, str) and _NAME.fullmatch(name)):
                raise ConfigError(
                    f"{quoted(name)} is no module's name or the end of one; modules_to_save and "
                    "trainable_token_indices name modules such as 'lm_head' or 'model.embed_tokens'."
                )
        for name, tokens in (self.token_rows or {}).items():
            self._check_tokens(name, tokens)

    @property
    def is_empty(self) -> bool:
        """Whether the adapter has factors alone, as far as its settings tell."""
        others = self.bias != "none" or self.modules_to_save or self.token_rows is not None or self.lora_bias
        return not others and self.start == "nothing"

    def saves(self, path: str) -> bool:
        """Whether modules_to_save names the module, or one that it is a part of."""
        parents = ancestors(path)
        return any(parent.endswith(name) for name in self.modules_to_save for parent in parents)

    def excludes(self, path: str) -> bool:
        """Whether modules_to_save keeps LoRA factors off the module (PEFT: a component of the path has the name)."""
        return any(f".{name}." in f".{path}." for name in self.modules_to_save)

    def tokens_of(self, path: str) -> tuple[int, ...]:
        """The tokens whose rows come for the embedding at `path`; none for another module."""
        rows = self.token_rows or {}
        names = [name for name in rows if name and path.endswith(name)] or [name for name in rows if not name]
        return rows[names[0]] if names else ()

    def _check_tokens(self, name: str, tokens: tuple[int, ...]) -> None:
        if not (isinstance(tokens, tuple) and all(is_whole(token) and 0 <= token < 2**31 for token in tokens)):
            raise ConfigError(
                f"trainable_token_indices of {name or 'the input embedding'} is {quoted(tokens)}; it must be a list "
                "of token ids."
            )
        if not 1 <= len(tokens) <= MAX_TOKEN_ROWS:
            raise ConfigError(
                f"trainable_token_indices of {name or 'the input embedding'} has {len(tokens)} tokens; it may have 1 "
                f"to {MAX_TOKEN_ROWS}."
            )
        if len(set(tokens)) < len(tokens):
            raise ConfigError(
                f"trainable_token_indices of {name or 'the input embedding'} names a token twice: {quoted(tokens)}."
            )


def ancestors(path: str) -> list[str]:
    """A module's path and those of the modules around it: "a.b" has "a.b" and "a"."""
    parts = path.split(".")
    return [".".join(parts[:stop]) for stop in range(len(parts), 0, -1)]
