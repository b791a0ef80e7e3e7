"""From what the passes collected to the scalings of each row's own tokens."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from loraplex.errors import RequestError
from loraplex.xlora.scalings.row_scalings import RowScalings
from loraplex.xlora.two_pass.two_pass import TwoPass


def collected_scalings(
    two_pass: TwoPass | None,
    tokens: Tensor | None,  # [rows, tokens]  what the passes saw, and for `generate` the last token, which none saw
    prompt_mask: Tensor | None,  # [rows, prompt tokens]; None: no padding
    end_tokens: Sequence[Collection[int]],  # by row: after the first of these past its prompt, its tokens are padding
) -> list[tuple[RowScalings, ...]]:
    """For each row, the scalings of each of its mixtures, without padding.

    Raises RequestError for a batch of embeddings, and for one whose rows have several sequences.
    """
    if tokens is None:
        raise RequestError("scalings are told by token, but only embeddings were given. Pass input_ids.")
    rows: list[tuple[RowScalings, ...]] = [() for _ in range(tokens.shape[0])]
    if two_pass is None:
        return rows
    for group, parts in zip(two_pass.mixture_rows.groups, two_pass.collected, strict=True):
        values = torch.cat(parts, dim=2)  # [uses, copies, tokens, lora_layers, experts]
        if values.shape[1] != 1:
            raise RequestError(
                "return_scalings tells each row's scalings, but here a row has several sequences (num_beams or "
                "num_return_sequences above 1). Pass each sequence as a row of its own."
            )
        for use, scalings in zip(group.uses, values[:, 0], strict=True):
            kept = own_tokens(tokens[use.row], len(scalings), prompt_mask, use.row, end_tokens[use.row])
            report = RowScalings(
                mixture=group.mixture.name,
                experts=group.mixture.experts,
                layers=group.mixture.layers,
                token_ids=tuple(tokens[use.row][kept].tolist()),
                values=scalings[kept].float().contiguous().cpu(),
            )
            rows[use.row] += (report,)
    return rows


def own_tokens(
    tokens: Tensor, num_seen: int, prompt_mask: Tensor | None, row: int, end_tokens: Collection[int]
) -> Tensor:  # [own tokens]  positions
    """The positions of a row's tokens that a pass saw and that are no padding."""
    stop = min(num_seen, len(tokens))
    num_prompt = 0 if prompt_mask is None else prompt_mask.shape[1]
    ends = [i for i in range(num_prompt, stop) if int(tokens[i]) in end_tokens]
    positions = torch.arange(ends[0] + 1 if ends else stop)
    if prompt_mask is None:
        return positions
    padding = (prompt_mask[row] == 0).nonzero().flatten()
    return positions[~torch.isin(positions, padding.cpu())]
