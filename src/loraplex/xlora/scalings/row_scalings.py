"""What a mixture's head predicted for one row, and its means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from loraplex.errors import ScalingsError

_SUM_TOLERANCE = 1e-3  # scalings may have been predicted in bfloat16, whose relative spacing is 2^-8 per expert


@dataclass(frozen=True, kw_only=True, eq=False)
class RowScalings:
    """The scalings of one row: the head's prediction after its softmax, before top-k and the global weight.

    Of a mixture with routers: its gates, without the weight of the row's link; 0 in layers where a token doesn't run.

    Raises ScalingsError where names and shape don't fit, or values are not finite float32.
    """

    mixture: str
    experts: tuple[str, ...]  # in head order
    layers: tuple[str, ...]  # module paths, in LoRA layer order
    token_ids: tuple[int, ...]
    values: Tensor  # [tokens, lora_layers, experts]  float32

    def __post_init__(self) -> None:
        for field in ("experts", "layers", "token_ids"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        object.__setattr__(self, "values", self.values.detach())
        expected = (len(self.token_ids), len(self.layers), len(self.experts))
        if tuple(self.values.shape) != expected or 0 in expected:
            raise ScalingsError(
                f"scalings of mixture {self.mixture!r} have shape {list(self.values.shape)}; expected [tokens, "
                f"lora_layers, experts] = {list(expected)}, each at least 1. Pass one row without padding."
            )
        if self.values.dtype != torch.float32 or not self.values.isfinite().all():
            raise ScalingsError(
                f"scalings of mixture {self.mixture!r} have dtype {self.values.dtype} and "
                f"{int((~self.values.isfinite()).sum())} values that are not finite; expected finite "
                "torch.float32. Pass values.float(); NaN comes from the head's weights or its input."
            )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def mean_by_expert(self) -> Tensor:  # [experts]
        """The mean over tokens and LoRA layers."""
        return self.values.mean(dim=(0, 1))

    def mean_by_layer(self) -> Tensor:  # [lora_layers, experts]
        """The mean over tokens."""
        return self.values.mean(dim=0)

    def mean_by_token(self) -> Tensor:  # [tokens, experts]
        """The mean over LoRA layers."""
        return self.values.mean(dim=1)

    def strongest(self) -> Tensor:  # [tokens]  int64
        """Each token's expert with the largest mean over LoRA layers; the first one of equals."""
        return self.mean_by_token().argmax(dim=-1)

    def by_block(self) -> "BlockScalings":
        """The mean over the LoRA layers of each transformer block, in LoRA layer order."""
        keys = [block_key(path) for path in self.layers]
        blocks = list(dict.fromkeys(keys))
        means = [self.values[:, [i for i, key in enumerate(keys) if key == block]].mean(dim=1) for block in blocks]
        return BlockScalings(labels=short_labels(blocks), values=torch.stack(means, dim=1))

    def entropy(self) -> Tensor:  # [tokens]  nats
        """How undecided the head is: -sum_i s_i ln(s_i) over experts, averaged over LoRA layers.

        0 is one expert, ln(experts) is all alike. Raises ScalingsError for a mixture without softmax, whose
        scalings are no distribution.
        """
        sums = self.values.sum(dim=-1)
        if (self.values < 0).any() or ((sums - 1).abs() > _SUM_TOLERANCE * len(self.experts)).any():
            raise ScalingsError(
                f"scalings of mixture {self.mixture!r} have no entropy: over experts they sum to "
                f"{sums.min():.4g} to {sums.max():.4g}, expected 1. Only a mixture with enable_softmax=True has one."
            )
        return torch.special.entr(self.values).sum(dim=-1).mean(dim=-1)

    @property
    def max_entropy(self) -> float:
        """ln(experts), in nats."""
        return math.log(len(self.experts))


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockScalings:
    """Scalings averaged over the LoRA layers of each transformer block."""

    labels: tuple[str, ...]  # a block's number; for a LoRA layer outside of blocks, its name
    values: Tensor  # [tokens, blocks, experts]


def block_key(path: str) -> str:
    """The module path up to its first number; the whole path if the module is in no block."""
    parts = path.split(".")
    before = list(takewhile(lambda part: not part.isdecimal(), parts))
    return ".".join(parts[: len(before) + 1])


def short_labels(paths: Sequence[str]) -> tuple[str, ...]:
    """The last part of each path; whole paths where two would share it, as a vision and a text tower's block 0."""
    last = [path.rpartition(".")[2] for path in paths]
    return tuple(name if last.count(name) == 1 else path for name, path in zip(last, paths, strict=True))


def check_same_source(rows: Sequence[RowScalings]) -> RowScalings:
    """Return the first row; raise ScalingsError for none, or if experts or LoRA layers differ between rows."""
    if not rows:
        raise ScalingsError("no scalings were given; expected those of at least one row.")
    for row in rows[1:]:
        if (row.experts, row.layers) != (rows[0].experts, rows[0].layers):
            raise ScalingsError(
                f"scalings of mixture {row.mixture!r} ({len(row.layers)} LoRA layers, experts {list(row.experts)}) "
                f"can't be averaged with those of {rows[0].mixture!r} ({len(rows[0].layers)} LoRA layers, experts "
                f"{list(rows[0].experts)}). Pass rows of mixtures with the same experts and LoRA layers."
            )
    return rows[0]


def mean_over_tokens(rows: Sequence[RowScalings]) -> Tensor:  # [lora_layers, experts]
    """The mean over all tokens of all rows, so that a long row counts for more than a short one."""
    check_same_source(rows)
    totals = torch.stack([row.values.double().sum(dim=0) for row in rows]).sum(dim=0)
    return (totals / sum(row.num_tokens for row in rows)).float()
