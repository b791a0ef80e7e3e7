"""What a decoder layer is made of, by the paths of its modules: the terms that kernels/csrc/layer.h computes."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraplex.layers.fusion.activations import Activation
from loraplex.layers.quantized.kinds import has_plain_weight

# The enumerations are those of kernels/csrc/layer.h, in their order.


class Projection(IntEnum):
    """Where query, key and value heads come from."""

    SEPARATE = 0  # three modules
    BLOCKS = 1  # one, which gives all queries, then keys, then values
    GROUPS = 2  # one, which gives for each key head its queries, key and value


class Rotary(IntEnum):
    """Which values of a head are turned together."""

    NONE = 0
    HALVES = 1
    PAIRS = 2
    PAIRS_OF_HALF = 3  # neighbours, whose cosines fill half a table
    NARROW_HALVES = 4  # values of both halves, with a cosine for each pair


class Gating(IntEnum):
    """What multiplies the activation."""

    NONE = 0
    GATE_FIRST = 1  # another module, or the second half of the same one
    UP_FIRST = 2  # its first half


class Scores(IntEnum):
    """What a router makes of its logits."""

    SOFTMAX = 0
    SIGMOID = 1


class ExpertGate(IntEnum):
    """What an expert makes of its first product."""

    NONE = 0  # an activation
    HALVES = 1  # one of the first half, times the second half
    CLAMPED_PAIRS = 2  # gpt-oss's, of even values and odd ones


@dataclass(frozen=True, kw_only=True)
class NormPart:
    """A norm over the last `size` values."""

    path: str
    size: int
    eps: float
    is_centered: bool  # LayerNorm; else it is a root mean square norm
    plus_one: bool  # it multiplies by 1 + weight


@dataclass(frozen=True, kw_only=True)
class AttentionPart:
    """Everything between an attention module's input and its output."""

    path: str  # "" where there is no layer around it
    projections: tuple[str, ...]  # query, key, value; or one
    out: str
    query_norm: NormPart | None
    key_norm: NormPart | None
    projection: Projection
    rotary: Rotary = Rotary.NONE
    scale_factor: float = 1.0  # of queries, before attention scales their products with keys


@dataclass(frozen=True, kw_only=True)
class MlpPart:
    """The feed-forward modules."""

    inputs: tuple[str, ...]  # gate and up; one that gives both; one without a gate
    down: str
    activation: Activation
    gating: Gating


@dataclass(frozen=True, kw_only=True)
class RouterPart:
    """What chooses experts for a token: those with the largest score + correction, of the best groups."""

    path: str
    num_experts: int
    top_k: int
    scores: Scores
    normalises: bool  # the chosen ones' scores add up to 1
    rounds: bool  # logits, to the model's dtype
    num_groups: int = 1
    top_groups: int = 1
    correction: str | None = None  # the path of a tensor [experts], as seen from the layer
    factor: float = 1.0  # of the weights


@dataclass(frozen=True, kw_only=True)
class ExpertsPart:
    """Stacked feed-forward experts."""

    path: str
    input: str  # the name of the parameter that reads states
    down: str
    router: RouterPart
    gate: ExpertGate
    activation: Activation = Activation.SILU
    alpha: float = 0.0
    limit: float = 0.0
    shared_gate: str | None = None  # gives a number whose sigmoid multiplies what `LayerParts.mlp` makes


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """A layer, or with neither `mlp` nor `experts` its attention alone."""

    attention: AttentionPart
    mlp: MlpPart | None = None
    experts: ExpertsPart | None = None  # whose sum is added to what `mlp` makes
    before_attention: NormPart | None = None
    behind_attention: NormPart | None = None
    before_mlp: NormPart | None = None
    behind_mlp: NormPart | None = None
    is_parallel: bool = False
    shares_norm: bool = False  # the feed-forward modules read what the attention reads
    multiplier: float = 1.0  # of what is added to the residual
    num_outputs: int = 0  # that it returns in a tuple, of which one has states; 0: it returns states

    @property
    def is_attention_only(self) -> bool:
        return self.mlp is None and self.experts is None

    @property
    def norms(self) -> tuple[NormPart | None, ...]:
        """In the order of layer_record.h."""
        own = (self.before_attention, self.behind_attention, self.before_mlp, self.behind_mlp)
        return (*own, self.attention.query_norm, self.attention.key_norm)

    @property
    def linears(self) -> tuple[str | None, ...]:
        """By the roles of layer.h: query, key, value, out, gate, up, down, router, shared gate."""
        query, *others = self.attention.projections
        first = (query, *(others or (None, None)), self.attention.out)
        mlp: tuple[str | None, ...] = (None, None, None)
        if self.mlp is not None:
            gate, *up = self.mlp.inputs
            mlp = (gate, *(up or (None,)), self.mlp.down)
        experts = self.experts
        return (*first, *mlp, *((None, None) if experts is None else (experts.router.path, experts.shared_gate)))

    def paths(self) -> Iterator[str]:
        """Of all modules that have parameters."""
        yield from (path for path in self.linears if path is not None)
        if self.experts is not None:
            yield self.experts.path
        yield from (norm.path for norm in self.norms if norm is not None)


def tensor_at(module: nn.Module, path: str) -> Tensor:
    """A parameter or buffer of a module or of a part of it."""
    owner, _, name = path.rpartition(".")
    tensor = getattr(module.get_submodule(owner), name)
    assert isinstance(tensor, Tensor), f"{path!r} was taken for a tensor"
    return tensor


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Its number of outputs and inputs."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    assert isinstance(module, nn.Linear), f"{type(module).__name__} was taken for a linear module"
    return module.out_features, module.in_features


def numbers_of(module: nn.Module) -> list[float]:
    """What it may multiply by: 1, and the numbers that it has."""
    own = [value for value in vars(module).values() if isinstance(value, float) and value > 0]
    return list(dict.fromkeys((1.0, *own)))


def is_plain_linear(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a module computes W x + b with a weight that the compiled product reads as it lies."""
    if not isinstance(module, (nn.Linear, Conv1D)) or "forward" in vars(module) or not has_plain_weight(module):
        return False
    return is_readable(module.weight, dtype) and (module.bias is None or is_readable(module.bias, dtype))


def is_readable(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the compiled call can read a parameter's values as they lie."""
    return tensor.is_contiguous() and tensor.dtype == dtype and tensor.device.type == "cpu"
