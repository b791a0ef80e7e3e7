"""LLM.int8() (arXiv 2208.07339) whose outliers are those of each token.

bitsandbytes multiplies in 16 bits every feature that is an outlier, |x| >= threshold, in any token of a call, and the
others as 8-bit integers. So what a token gets depends on those beside it: on other rows, on padding, on how a prompt is
cut. Here each token has the outliers that it has when it is alone:

    y[t] = W8 q(x[t] without its outliers) + W (x[t]'s outliers)

which is what bitsandbytes gives for a call of that token alone, up to rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from loraplex.layers.quantized.kinds import BNB_INT8

_THRESHOLD = "loraplex_threshold"
_NUM_USERS = "loraplex_outlier_users"
_classes: dict[Any, type[nn.Module]] = {}


def has_outliers(module: Any) -> bool:
    """Whether it is an int8 module that decomposes its input, or did before `keep_tokens_apart`."""
    return BNB_INT8.is_of(module) and (_THRESHOLD in vars(module) or module.state.threshold > 0)


def keep_tokens_apart(module: Any) -> None:
    """Let a module for which `has_outliers` holds decompose each token by itself, until all its users join them."""
    known = vars(module)
    known[_NUM_USERS] = known.get(_NUM_USERS, 0) + 1
    if known[_NUM_USERS] == 1:
        known[_THRESHOLD] = module.state.threshold
        module.state.threshold = 0.0
        module.__class__ = _with_own_outliers(type(module))


def join_tokens(module: Any) -> None:
    """One user less; the last one gives the module back as it was."""
    known = vars(module)
    known[_NUM_USERS] -= 1
    if known[_NUM_USERS] == 0:
        module.__class__ = type(module).__base__
        module.state.threshold = known.pop(_THRESHOLD)
        del known[_NUM_USERS]


def _with_own_outliers(former: Any) -> type[nn.Module]:
    """A class below the module's own, the same one for all modules of that class."""
    known = _classes.get(former)
    if known is None:
        known = _classes[former] = _made_class(former)
    return known


def _made_class(former: Any) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        is_outlier = x.detach().half().abs() >= vars(self)[_THRESHOLD]  # bitsandbytes compares in float16
        features = is_outlier.flatten(0, -2).any(dim=0).nonzero()[:, 0]
        if not len(features):
            return former.forward(self, x)
        y = former.forward(self, x.masked_fill(is_outlier, 0))
        outliers = x.masked_fill(~is_outlier, 0)[..., features]
        return y + nn.functional.linear(outliers, _columns(self, features, x.dtype))

    return type(former.__name__, (former,), {"forward": forward, "__module__": former.__module__})


def _columns(module: Any, features: Tensor, dtype: torch.dtype) -> Tensor:  # [out, features]
    """The weight's values for some of the inputs."""
    values: Tensor = module.state.CB[:, features] * (module.state.SCB.view(-1, 1) / 127)
    return values.to(dtype)
