"""Random interventions for tiny models, and what they make of a row alone, by hooks of the formulas themselves."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.residual import Intervention, Positions, ReftResidual, SteeringVector
from loraplex.residual.modules import Residual
from loraplex.residual.positions import ALL
from loraplex.residual.reft import Site

SITE_NAMES = {"attention": ("self_attn", "attn", "attention"), "mlp": ("mlp",)}


def block_list(base: PreTrainedModel) -> nn.ModuleList:
    return next(m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)


def random_block_vector(
    base: PreTrainedModel, seed: int, site: Site = "block", positions: Positions = ALL, at: Sequence[int] = (0, 1)
) -> SteeringVector:
    draw = torch.Generator().manual_seed(seed)
    hidden = base.config.hidden_size
    vectors = {block: torch.randn(hidden, generator=draw) for block in at}
    return SteeringVector(vectors=vectors, base=None, site=site, positions=positions)


def random_reft(
    base: PreTrainedModel, seed: int, positions: Positions, *, r: int = 3, site: Site = "block", subtracts: bool = True
) -> ReftResidual:
    """Orthogonal rotations, as pyreft's."""
    draw = torch.Generator().manual_seed(seed)
    hidden = base.config.hidden_size
    made = []
    for block in (0, 1):
        rotation = torch.linalg.qr(torch.randn(hidden, r, generator=draw))[0].t().contiguous()
        w = torch.randn(r, hidden, generator=draw) * hidden**-0.5
        b = torch.randn(r, generator=draw)
        made.append(
            Intervention(block=block, site=site, positions=positions, r=rotation, w=w, b=b, subtracts=subtracts)
        )
    return ReftResidual(interventions=tuple(made))


def meant(positions: Positions, num_prompt: int, num_tokens: int) -> list[int]:
    """The tokens that positions mean: pyreft's `get_intervention_locations` for first and last ones."""
    if positions.which == "all":
        return list(range(num_tokens))
    if positions.which == "prompt":
        return list(range(num_prompt))
    if positions.which == "generated":
        return list(range(num_prompt, num_tokens))
    first, last = (min(num_prompt // 2, n) for n in (positions.first, positions.last))
    return [*range(first), *range(num_prompt - last, num_prompt)]


def _change(residual: Residual, weight: float, site: Site, block: int, num_prompt: int) -> list[Callable]:
    """h [1, tokens, hidden] to what it becomes, in float64."""
    changes = []
    if isinstance(residual, SteeringVector):
        if residual.site == site and block in residual.vectors:

            def add(h: Tensor) -> Tensor:  # repeng's ControlModule, llama.cpp's build_cvec
                tokens = meant(residual.positions, num_prompt, h.shape[1])
                h[:, tokens] += weight * residual.vectors[block].double()
                return h

            changes.append(add)
        return changes
    for own in residual.interventions:
        if (own.site, own.block) == (site, block):

            def intervene(h: Tensor, own: Intervention = own) -> Tensor:  # pyreft/interventions.py
                tokens = meant(own.positions, num_prompt, h.shape[1])
                base, rotation = h[:, tokens], own.r.double().t()
                source = base @ own.w.double().t() + own.b.double()
                rotated = base @ rotation if own.subtracts else 0
                h[:, tokens] = base + weight * (source - rotated) @ rotation.t()
                return h

            changes.append(intervene)
    return changes


@contextmanager
def intervened(base: PreTrainedModel, chain: Sequence[tuple[Residual, float]], num_prompt: int) -> Iterator[None]:
    """The base model with hooks that compute the formulas for all its rows."""
    handles = []
    for number, block in enumerate(block_list(base)):
        for site in ("attention", "mlp", "block"):
            module = block
            if site != "block":
                module = next(getattr(block, name) for name in SITE_NAMES[site] if hasattr(block, name))
            changes = [
                change for residual, weight in chain for change in _change(residual, weight, site, number, num_prompt)
            ]

            def hook(module: nn.Module, args: object, output: object, changes: list[Callable] = changes) -> object:
                states = output[0] if isinstance(output, tuple) else output
                h = states.double().clone()
                for change in changes:
                    h = change(h)
                h = h.to(states.dtype)
                return (h, *output[1:]) if isinstance(output, tuple) else h

            if changes:
                handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def expected_logits(
    base: PreTrainedModel, ids: Sequence[int], chain: Sequence[tuple[Residual, float]], num_prompt: int
) -> Tensor:  # [tokens, vocab]
    """A row's logits alone."""
    with intervened(base, chain, num_prompt):
        return base(torch.tensor([list(ids)]), use_cache=False).logits[0]


def expected_answer(
    base: PreTrainedModel, prompt: Sequence[int], chain: Sequence[tuple[Residual, float]], num_tokens: int
) -> tuple[int, ...]:
    """The greedy answer without a cache."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(expected_logits(base, ids, chain, len(prompt))[-1].argmax()))
    return tuple(ids[len(prompt) :])
