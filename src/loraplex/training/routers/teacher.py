"""An X-LoRA that teaches a router: its gates for every token and LoRA layer, and its logits for the answers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.errors import MixtureError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.routers.mixture import RoutedMixture
from loraplex.routing.layer_gates import LayerGates
from loraplex.training.forward.batch import RowBatch
from loraplex.training.forward.loss import answer_logits
from loraplex.training.mixture.hidden_states import HiddenStates
from loraplex.training.mixture.parameters import frozen_slots
from loraplex.training.mixture.routing import Experts, scaled_routing
from loraplex.validation import listed
from loraplex.xlora.mixture import Mixture, kept_scalings


class Teacher:
    """A frozen X-LoRA beside a router in training. Raises MixtureError where it can't teach this one."""

    def __init__(
        self, model: MultiLoraModel, mixture: Mixture, student: RoutedMixture, *, budget_bytes: int, max_tokens: int
    ) -> None:
        self.mixture = mixture
        self.experts = Experts(frozen_slots(model, mixture.experts), frozen=True)
        self.hidden_states = HiddenStates(
            model.base, mixture, self.experts, budget_bytes=budget_bytes, tokens_per_forward=max_tokens
        )
        self._base: PreTrainedModel = model.base
        self._columns = _columns(mixture, student)
        self._layers = _layers(mixture, student)
        self._gates = LayerGates()

    @torch.no_grad()
    def lesson(self, batch: RowBatch, *, with_logits: bool) -> "Lesson":
        """What the teacher says of a batch."""
        hidden = self.hidden_states.of(batch)
        scalings = self.mixture.head(hidden.flatten(0, 1)[None, None])  # [1, 1, tokens, layers, experts]
        logits = self._logits(batch, scalings) if with_logits else None
        kept = kept_scalings(scalings[0, 0], self.mixture.config)
        return Lesson(kept[..., self._columns], self._layers, logits)

    def _logits(self, batch: RowBatch, scalings: Tensor) -> Tensor:  # [outputs, vocabulary]
        self._gates.set(self.mixture.gates(scalings, torch.ones(1, device=scalings.device)))
        num_rows, length = batch.input_ids.shape
        selected = batch.output_rows * length + batch.output_positions
        routing = scaled_routing(self.experts, self._gates, num_rows, length, selected)
        return answer_logits(self._base, batch, routing)


class Lesson:
    """A teacher's gates and logits for one batch."""

    def __init__(self, scalings: Tensor, layers: dict[int, int], logits: Tensor | None) -> None:
        self._scalings = scalings  # [tokens, teacher's layers, experts in the router's order]
        self._layers = layers
        self.logits = logits

    def scalings(self, module: int, positions: Tensor | None) -> Tensor:  # [tokens, experts]
        """What the teacher's layer keeps, of all the padded rows' tokens or of those at `positions`."""
        of_module = self._scalings[:, self._layers[module]]
        return of_module if positions is None else of_module[positions]


def gate_kl(
    scalings: Tensor,  # [tokens, experts]  of the teacher
    logits: Tensor,  # [tokens, experts]  of the router; -inf where an expert doesn't adapt the layer
    *,
    temperature: float,
    is_softmax: bool,
) -> Tensor:  # [tokens]
    """KL(teacher's gates || router's) of each token, over the experts that adapt the layer.

    For a softmax: sum_i t_i log(t_i / p_i), p = softmax(logits / temperature) over all experts, before the router's
    top_k or top_p, and t the teacher's scalings after its top-k, divided by their sum. Without the teacher's softmax
    they may be negative: those count as 0, and a token of which none is left has no KL. For sigmoids: the sum of the
    experts' Bernoulli KLs with t the scalings, cut to [0, 1].
    """
    missing = torch.isinf(logits)
    target = scalings.float().masked_fill(missing, 0).clamp_min(0)
    if not is_softmax:
        target, scores = target.clamp_max(1), (logits / temperature).masked_fill(missing, 0)
        cross = torch.nn.functional.binary_cross_entropy_with_logits(scores, target, reduction="none")
        own = torch.special.xlogy(target, target) + torch.special.xlogy(1 - target, 1 - target)
        return (cross + own).masked_fill(missing, 0).sum(dim=-1)
    total = target.sum(dim=-1, keepdim=True)
    target = target / total.clamp_min(torch.finfo(torch.float32).tiny)
    log_probabilities = torch.log_softmax(logits / temperature, dim=-1).masked_fill(missing, 0)
    return (torch.special.xlogy(target, target) - target * log_probabilities).sum(dim=-1)


def logit_kl(teacher: Tensor, student: Tensor) -> Tensor:  # both [outputs, vocabulary] -> [outputs]
    """KL(teacher || student) of each answer token's distribution."""
    return torch.nn.functional.kl_div(
        torch.log_softmax(student.float(), dim=-1),
        torch.log_softmax(teacher.float(), dim=-1),
        reduction="none",
        log_target=True,
    ).sum(dim=-1)


def _columns(teacher: Mixture, student: RoutedMixture) -> list[int]:
    """Of the router's experts, their places in the teacher's head: known by name, without the mixture's own."""
    names = [_plain_names(teacher.experts, teacher.name), _plain_names(student.experts, student.name)]
    if sorted(names[0]) != sorted(names[1]):
        raise MixtureError(
            f"the teacher {teacher.name!r} has the experts {listed(names[0])}, the mixture {student.name!r} has "
            f"{listed(names[1])}. A teacher's experts must have the names of the router's."
        )
    return [names[0].index(name) for name in names[1]]


def _layers(teacher: Mixture, student: RoutedMixture) -> dict[int, int]:
    """By module of the router, its layer in the teacher's scalings."""
    missing = [
        path for module, path in zip(student.modules, student.layers, strict=True) if module not in teacher.modules
    ]
    if missing:
        raise MixtureError(
            f"the teacher {teacher.name!r} has no scalings for {listed(missing)}, which the experts of "
            f"{student.name!r} adapt. Use experts that adapt the modules of the teacher's."
        )
    return {module: teacher.modules.index(module) for module in student.modules}


def _plain_names(experts: Sequence[str], mixture: str) -> list[str]:
    return [expert.removeprefix(f"{mixture}/") for expert in experts]
