"""Key edits, tried beside steering: spectral editing key amplification (SEKA, arXiv 2603.01281), for emphasis.py.

    k' = k + g/2 (P+ + P-) k          of the keys (before their rotation) of emphasised tokens, by layer and KV head

The projections are learnt without training, from the keys of the same tokens in three texts: beside nothing (k0),
beside a question that asks for them (k+), and beside one that asks for something else (k-). P+ are the first directions
of the covariance of k0 and k+ that have nine tenths of it, P- those of k0 and k- behind these. Only heads whose keys
the question changes most are edited.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loraplex import MultiLoraModel
from loraplex.models.text.prompts import as_chat, encode_prompts
from loraplex.residual.steering import spans_of_text

KEPT = 0.9  # of a covariance
BATCH = 20  # cases that run together


class Triple(NamedTuple):
    """A context, the part of it that is looked at, and questions that ask for it and for something else."""

    context: str
    part: str
    question: str
    other_question: str


class Edits(NamedTuple):
    """What was learnt: projections and how much a question changes keys."""

    projections: Tensor  # [layers, KV heads, dim, dim]  P+ + P-
    changes: Tensor  # [layers, KV heads]

    def of(self, gain: float, heads: float) -> Tensor:  # [layers, KV heads, dim, dim]
        """What is added to keys is this times them; `heads` is the share of heads that are edited."""
        least = self.changes.flatten().sort(descending=True).values[max(1, round(heads * self.changes.numel())) - 1]
        return self.projections * (gain / 2) * (self.changes >= least)[:, :, None, None]


def _key_modules(model: MultiLoraModel) -> list[nn.Module]:
    return [block.self_attn.k_proj for block in model.base.model.layers]  # type: ignore[union-attr,operator]


@contextmanager
def _hooked(model: MultiLoraModel, run: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """`run(layer, keys)`, keys [rows, tokens, KV heads * dim], behind each module that makes keys."""

    def hook(layer: int) -> Callable[[nn.Module, object, Tensor], Tensor | None]:
        return lambda module, args, keys: run(layer, keys)

    handles = [module.register_forward_hook(hook(layer)) for layer, module in enumerate(_key_modules(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _keys_of(model: MultiLoraModel, text: str, part: str) -> Tensor:  # [layers, KV heads, tokens, dim]
    """The keys of a part of a text."""
    chat = as_chat(model.tokenizer, text)
    ((start, stop), *_) = spans_of_text(model.tokenizer, chat, part)
    found: list[Tensor] = []
    dim = model.base.config.head_dim

    def keep(layer: int, keys: Tensor) -> None:
        found.append(keys[0, start:stop].float().unflatten(-1, (-1, dim)).transpose(0, 1))

    with _hooked(model, keep):
        model(**encode_prompts(model.tokenizer, [text]))
    return torch.stack(found)


def learn(model: MultiLoraModel, triples: Sequence[Triple]) -> Edits:
    """The projections of all layers and KV heads."""
    texts = [
        (one.context, f"{one.question} {one.context}", f"{one.other_question} {one.context}", one.part)
        for one in triples
    ]
    alone, asked, others = (
        torch.cat([_keys_of(model, text[which], text[3]) for text in texts], dim=2).double() for which in range(3)
    )  # [layers, KV heads, tokens, dim] each
    wanted = _directions(alone.mT @ asked, first=True)
    unwanted = _directions(alone.mT @ others, first=False)
    return Edits((wanted + unwanted).float(), (asked - others).norm(dim=-1).mean(dim=-1))


def _directions(covariance: Tensor, *, first: bool) -> Tensor:  # [.., dim, dim]
    """Projections to the directions that have KEPT of a covariance, or to those behind them."""
    u, sizes, _ = torch.linalg.svd(covariance)
    shares = sizes.cumsum(dim=-1) / sizes.sum(dim=-1, keepdim=True)
    is_first = torch.cat([torch.ones_like(shares[..., :1], dtype=torch.bool), shares[..., :-1] < KEPT], dim=-1)
    chosen = u * (is_first if first else ~is_first).unsqueeze(-2)
    return chosen @ chosen.mT


@torch.no_grad()
def answer(
    model: MultiLoraModel, prompts: Sequence[str], parts: Sequence[str], added: Tensor, max_tokens: int
) -> list[str]:
    """Greedy answers with the keys of each prompt's part edited; `added` as `Edits.of` gives it."""
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH):
        some = slice(start, start + BATCH)
        inputs = encode_prompts(model.tokenizer, prompts[some])
        num_tokens = inputs["input_ids"].shape[1]
        mask = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
        for row, (prompt, part) in enumerate(zip(prompts[some], parts[some], strict=True)):
            padding = num_tokens - int(inputs["attention_mask"][row].sum())
            for first, last in spans_of_text(model.tokenizer, as_chat(model.tokenizer, prompt), part):
                mask[row, padding + first : padding + last] = True

        def edit(layer: int, keys: Tensor, mask: Tensor = mask) -> Tensor | None:
            if keys.shape[1] != mask.shape[1]:  # tokens that are generated
                return None
            heads = keys[mask].float().unflatten(-1, (added.shape[1], -1))  # [tokens, KV heads, dim]
            edited = heads + torch.einsum("tkd,ked->tke", heads, added[layer])
            keys = keys.clone()
            keys[mask] = edited.flatten(1).to(keys.dtype)
            return keys

        with _hooked(model, edit):
            made = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, packed=False)
        texts += model.tokenizer.batch_decode(made[:, num_tokens:], skip_special_tokens=True)
    return texts
