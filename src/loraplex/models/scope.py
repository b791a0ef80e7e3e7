"""The scope of one request batch: adapters leased into slots, and the rows' routing made current."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from loraplex.adapters.store import AdapterStore
from loraplex.adapters.version import AdapterVersion
from loraplex.errors import RequestError
from loraplex.routing.bank import Bank
from loraplex.routing.choice import Link
from loraplex.routing.rows import Route, RowRouting, use_routing


@contextmanager
def adapter_scope(
    store: AdapterStore, bank: Bank, links: Sequence[Link], input_ids: Tensor | None, *, fast_decode: bool = False
) -> Iterator[None]:
    """Run the block with every row's link in force; its adapters keep their slots until it ends."""
    names = [name for link in links for name, _ in link]
    with store.lease(names) as leased:
        rows = [_routes(link, leased, input_ids, row) for row, link in enumerate(links)]
        with use_routing(RowRouting(rows, bank, fast_decode=fast_decode)):
            yield


def _routes(link: Link, leased: dict[str, AdapterVersion], input_ids: Tensor | None, row: int) -> list[Route]:
    routes = []
    for name, weight in link:
        version = leased[name]
        assert version.slot is not None, f"{name!r} is leased but in no slot"
        assert version.prepared is not None, f"{name!r} is leased but not in host memory"
        invocation, last_tokens = version.prepared.invocation, None
        if invocation is not None:
            if input_ids is None:
                raise RequestError(
                    f"row {row} asks for the aLoRA {name!r}, whose start is found in input_ids, but only embeddings "
                    "were given. Pass input_ids."
                )
            last_tokens = tokens_from_invocation(input_ids[row], invocation)
        routes.append(Route(slot=version.slot, weight=weight, last_tokens=last_tokens))
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
