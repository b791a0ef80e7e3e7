"""The scope of one request batch: adapters leased into slots, and the rows' routing made current."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.adapters.store import AdapterStore
from loraplex.adapters.version import AdapterVersion
from loraplex.errors import RequestError
from loraplex.models.mixtures import Mixtures
from loraplex.residual.scope import use_attention
from loraplex.routing.bank import Bank
from loraplex.routing.choice import Link
from loraplex.routing.rows import Route, RowRouting, use_routing
from loraplex.xlora.attach import use_two_pass
from loraplex.xlora.mixture import Mixture
from loraplex.xlora.options import TwoPassOptions
from loraplex.xlora.two_pass import TwoPass
from loraplex.xlora.uses import MixtureUse, plan_mixture_rows


@contextmanager
def adapter_scope(
    base: PreTrainedModel,
    store: AdapterStore,
    mixtures: Mixtures,
    bank: Bank,
    links: Sequence[Link],
    input_ids: Tensor | None,
    *,
    fast_decode: bool = False,
    options: TwoPassOptions,
) -> Iterator[TwoPass | None]:
    """Run the block with every row's link in force; its adapters keep their slots until it ends.

    Yields the state of the two passes if any row goes through a mixture.
    """
    found, names = mixtures.expand(links)
    with store.lease(names) as leased:
        rows = [_routes(link, leased, input_ids, row) for row, link in enumerate(links)]
        uses = [use for row, link in enumerate(links) for use in _uses(link, row, found, leased)]
        if not uses:
            with use_routing(RowRouting(rows, bank, fast_decode=fast_decode)):
                yield None
            return
        two_pass = TwoPass(
            base,
            plan_mixture_rows(uses),
            rows,
            bank,
            options,
            fast_decode=fast_decode,
            around_scaling=lambda: use_attention(None),  # the scaling pass has no residuals, captures or steering
        )
        with use_routing(two_pass.routing), use_two_pass(two_pass):
            yield two_pass


def _uses(
    link: Link, row: int, found: Mapping[str, Mixture], leased: Mapping[str, AdapterVersion]
) -> Iterator[MixtureUse]:
    for name, weight in link:
        if name in found:
            mixture = found[name]
            slots = tuple(_slot(leased[expert]) for expert in mixture.experts)
            yield MixtureUse(row=row, mixture=mixture, weight=weight, slots=slots)


def _slot(version: AdapterVersion) -> int:
    assert version.slot is not None, f"{version.name!r} is leased but in no slot"
    return version.slot


def _routes(link: Link, leased: Mapping[str, AdapterVersion], input_ids: Tensor | None, row: int) -> list[Route]:
    """The routes of the plain adapters of a link."""
    routes = []
    for name, weight in link:
        if name not in leased:
            continue
        version = leased[name]
        last_tokens = None
        if version.invocation is not None:
            if input_ids is None:
                raise RequestError(
                    f"row {row} asks for the aLoRA {name!r}, whose start is found in input_ids, but only embeddings "
                    "were given. Pass input_ids."
                )
            last_tokens = tokens_from_invocation(input_ids[row], version.invocation)
        routes.append(Route(slot=_slot(version), weight=weight, last_tokens=last_tokens))
    return routes


def tokens_from_invocation(ids: Tensor, invocation: Sequence[int]) -> int:
    """How many of a row's last tokens an aLoRA adapts: from the last occurrence of its invocation on; 0 without one.

    As PEFT counts them (`calculate_alora_offsets`): from the end, so that tokens generated later are adapted too.
    """
    wanted = torch.tensor(invocation, device=ids.device)
    if ids.numel() < wanted.numel():
        return 0
    windows = ids.unfold(0, wanted.numel(), 1)  # [positions, invocation]
    starts = (windows == wanted).all(dim=1).nonzero()
    return 0 if starts.numel() == 0 else ids.numel() - int(starts[-1])
