"""What the gates of one forward pass come to: divergence from a teacher's, regularizers, and means for the log."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.routers.router import LinearRouter
from loraplex.training.routers.regularizers import entropy, router_z_loss, switch_load_balance
from loraplex.training.routers.routing import LayerGating
from loraplex.training.routers.teacher import Lesson, gate_kl


class Counts(NamedTuple):
    """Of all rows that a mean is over: the tokens that a LoRA layer sees, and those that lm_head sees."""

    num_tokens: int
    num_answers: int

    def of(self, gating: LayerGating) -> int:
        return self.num_tokens if gating.positions is None else self.num_answers


class GatingTerms:
    """Listens to the layers of one pass; each term is its share of a mean over LoRA layers and tokens."""

    def __init__(
        self,
        router: LinearRouter,
        is_token: Tensor,  # [rows, padded]
        counts: Counts,
        *,
        lesson: Lesson | None,
        regularizers: frozenset[str],  # of "load_balance", "sparsity" and "z_loss"
        fractions: Mapping[int, Tensor],  # by module, for the load balance
        trains: bool,
    ) -> None:
        self.terms: dict[str, Tensor] = {}
        self._router = router
        self._is_token = is_token.flatten()
        self._counts = counts
        self._lesson = lesson
        self._regularizers = regularizers
        self._fractions = fractions
        self._trains = trains
        self._gate_sums = torch.zeros(is_token.numel(), router.num_experts, device=is_token.device)
        self._num_layers = 0

    def __call__(self, gating: LayerGating) -> None:
        if gating.positions is None:
            self._gate_sums += gating.gates.detach()
            self._num_layers += 1
        share = 1 / (self._counts.of(gating) * len(self._router.widths))
        if self._lesson is not None:
            self._add("gate_kl", self._divergence(gating, self._lesson), share)
        if self._regularizers:
            self._regularize(gating, share)

    @property
    def mean_gates(self) -> Tensor:  # [rows * padded, experts]
        """Of each token, over the LoRA layers of the decoder."""
        return self._gate_sums / max(1, self._num_layers)

    def _divergence(self, gating: LayerGating, lesson: Lesson) -> Tensor:
        """Each layer's router learns from what its layer reads, taken as it is: no gradient flows into the input."""
        config = self._router.config
        with torch.set_grad_enabled(self._trains):
            logits = self._router.logits(gating.module, gating.x.detach(), gating.experts)
            scalings = lesson.scalings(gating.module, gating.positions)
            is_softmax = config.activation == "softmax"
            divergences = gate_kl(scalings, logits, temperature=config.temperature, is_softmax=is_softmax)
            return self._tokens(divergences, gating).sum()

    def _regularize(self, gating: LayerGating, share: float) -> None:
        logits = self._tokens(gating.logits, gating)
        probabilities = torch.softmax(logits / self._router.config.temperature, dim=-1)
        if "load_balance" in self._regularizers:
            num_experts = sum(expert is not None for expert in gating.experts)
            balance = switch_load_balance(probabilities, self._fractions[gating.module], num_experts)
            self._add("load_balance", balance, share)
        if "sparsity" in self._regularizers:
            self._add("sparsity", entropy(probabilities), share)
        if "z_loss" in self._regularizers:
            self._add("z_loss", router_z_loss(logits), share)

    def _tokens(self, values: Tensor, gating: LayerGating) -> Tensor:
        """Without those of padding."""
        return values if gating.positions is not None else values[self._is_token]

    def _add(self, name: str, total: Tensor, share: float) -> None:
        with torch.set_grad_enabled(self._trains):  # the pass itself may be without gradients
            self.terms[name] = total * share if name not in self.terms else self.terms[name] + total * share


class ChoiceCounts:
    """Listens to passes: of each LoRA layer, how many tokens have each expert as their most probable one."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._counts: dict[int, Tensor] = {}
        self._is_token: Tensor | None = None

    def begin(self, is_token: Tensor) -> None:  # [rows, padded]
        """The pass that follows has these tokens."""
        self._is_token = is_token.flatten()

    def __call__(self, gating: LayerGating) -> None:
        assert self._is_token is not None, "a pass began before its tokens were told"
        logits = gating.logits if gating.positions is not None else gating.logits[self._is_token]
        counts = torch.bincount(logits.argmax(dim=-1), minlength=self._num_experts).float()
        self._counts[gating.module] = self._counts.get(gating.module, torch.zeros_like(counts)) + counts

    def fractions(self) -> dict[int, Tensor]:  # [experts] by module
        return {module: counts / counts.sum() for module, counts in self._counts.items()}
