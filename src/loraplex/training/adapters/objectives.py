"""What a job minimizes: the answers' cross-entropy, the same times a reward, or DPO's loss of pairs.

The gradient of each is a weighted sum of the gradients of the rows' summed cross-entropies C (C = -log p of an answer),
so rows of all jobs share passes whatever their losses are. For DPO (arXiv 2305.18290, equation 7), with C0 under the
reference, the adapter that the job starts from (`init_from`), else the base model:

    margin m = beta ((C0_chosen - C_chosen) - (C0_rejected - C_rejected)), loss -log sigmoid(m),
    dloss/dC_chosen = beta sigmoid(-m) = -dloss/dC_rejected

These weights are known once all rows of the micro-batch have been through a pass without gradients.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.data.examples import Example

_MAX_LOSS = math.log(sys.float_info.max)
LossName = Literal["cross_entropy", "reward", "dpo"]


class PairLosses(NamedTuple):
    """DPO of several pairs."""

    losses: Tensor  # [pairs]
    margins: Tensor  # [pairs]
    weights: Tensor  # [pairs, 2]  of the summed cross-entropies of the chosen and the rejected answer


def pair_losses(
    sums: Tensor,  # [pairs, 2]  summed cross-entropies of the chosen and the rejected answer
    references: Tensor,  # [pairs, 2]  the same under the reference
    beta: float,
) -> PairLosses:
    """DPO's losses, and what they weigh the gradients of `sums` with."""
    gains = references - sums  # log p - log p0
    margins = beta * (gains[:, 0] - gains[:, 1])
    slope = beta * torch.sigmoid(-margins)
    return PairLosses(-F.logsigmoid(margins), margins, torch.stack([slope, -slope], dim=1))


class PairSums:
    """Losses, margins and pairs whose chosen answer gained more, summed by job."""

    def __init__(self, num_jobs: int) -> None:
        self._sums = torch.zeros(num_jobs, 3)

    def add(self, job: int, found: PairLosses) -> None:
        preferred = (found.margins > 0).float()
        self._sums[job] += torch.stack([found.losses, found.margins, preferred], dim=1).sum(dim=0).cpu()

    def added_up(self, ranks: ProcessGroup, device: torch.device) -> "PairSums":
        """The sums over all processes."""
        total = PairSums(len(self._sums))
        total._sums = ranks.add_up(self._sums.to(device)).cpu()
        return total

    def loss(self, job: int, num_pairs: int) -> float:
        return float(self._sums[job, 0]) / num_pairs

    def details(self, job: int, num_pairs: int) -> dict[str, float]:
        """For the log: the mean margin, and the share of pairs whose chosen answer gained more."""
        _, margin, preferred = (self._sums[job] / num_pairs).tolist()
        return {"margin": margin, "accuracy": preferred}


def perplexity(loss: float) -> float:
    """exp of a mean loss; what is too large is infinite, which a log can't have: then it is the largest number."""
    return math.exp(loss) if loss < _MAX_LOSS else sys.float_info.max


@dataclass(frozen=True)
class References:
    """Under the reference, the summed cross-entropies of every pair that a run meets."""

    sums: Mapping[int, Tensor]  # by the pair's id() in memory: [2]

    def of(self, pairs: Sequence[Example]) -> Tensor:  # [pairs, 2]
        return torch.stack([self.sums[id(pair)] for pair in pairs])
