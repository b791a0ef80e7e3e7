"""From what routers' layers kept to the gates of each row's own tokens, told as scalings are."""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from loraplex.errors import RequestError
from loraplex.routers.mixture import RoutedMixture
from loraplex.routing.adapter_spec import Link
from loraplex.routing.gate_record import GateLog
from loraplex.xlora.scalings.report import own_tokens
from loraplex.xlora.scalings.row_scalings import RowScalings


def collected_gates(
    log: GateLog | None,
    mixtures: Mapping[str, RoutedMixture],
    links: Sequence[Link],
    tokens: Tensor | None,  # [rows, tokens]  as for `collected_scalings`
    prompt_mask: Tensor | None,  # [rows, prompt tokens]; None: no padding
    end_tokens: Sequence[Collection[int]],
) -> list[tuple[RowScalings, ...]]:
    """For each row, the gates of each of its mixtures with routers, without padding and without the link's weights.

    Raises RequestError for a batch of embeddings, and for one whose rows have several sequences.
    """
    if log is None:
        return [() for _ in links]
    if tokens is None:
        raise RequestError("scalings are told by token, but only embeddings were given. Pass input_ids.")
    rows: list[tuple[RowScalings, ...]] = [() for _ in links]
    for row, link in enumerate(links):
        for name in (name for name, _ in link if name in mixtures):
            mixture = mixtures[name]
            gates = log.gates((row, name), len(mixture.experts))  # [tokens, modules, experts]
            kept = own_tokens(tokens[row], len(gates), prompt_mask, row, end_tokens[row])
            rows[row] += (
                RowScalings(
                    mixture=name,
                    experts=mixture.experts,
                    layers=mixture.layers,
                    token_ids=tuple(tokens[row][kept].tolist()),
                    values=gates[kept][:, list(mixture.modules)].contiguous(),
                ),
            )
    return rows


def in_link_order(
    first: Sequence[tuple[RowScalings, ...]], second: Sequence[tuple[RowScalings, ...]], links: Sequence[Link]
) -> list[tuple[RowScalings, ...]]:
    """Both kinds' scalings of each row, in the order of its link."""
    rows = []
    for own, others, link in zip(first, second, links, strict=True):
        places = {name: place for place, (name, _) in enumerate(link)}
        rows.append(tuple(sorted((*own, *others), key=lambda scalings: places[scalings.mixture])))
    return rows
