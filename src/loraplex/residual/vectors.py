"""Steering vectors from contrasting prompts: where the states of the one kind differ from those of the other."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.errors import RequestError
from loraplex.residual.fingerprint import BaseFingerprint
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.modules import SteeringVector
from loraplex.residual.reft import Site
from loraplex.residual.sites import BlockSites

Method = Literal["mean", "pca", "pca-center"]
METHODS: tuple[Method, ...] = ("mean", "pca", "pca-center")
BATCH_SIZE = 32  # texts that run together, as in repeng


def vector_from_pairs(
    base: PreTrainedModel,
    layers: AttentionLayers,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],  # (wanted, unwanted)
    *,
    at: Sequence[int] | None = None,
    method: Method = "mean",
    batch_size: int = BATCH_SIZE,
) -> SteeringVector:
    """A vector on attention blocks' outputs, where residuals are added; `method` as in `directions`."""
    wanted = _chosen(at, sorted(layers.layers))
    modules = {layer: base.get_submodule(layers.layers[layer].path) for layer in wanted}
    vectors = directions(base, modules, tokenizer, pairs, method=method, batch_size=batch_size)
    return SteeringVector(vectors=vectors, base=layers.identity)


def block_vector_from_pairs(
    base: PreTrainedModel,
    sites: BlockSites,
    identity: BaseFingerprint,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],  # (wanted, unwanted)
    *,
    site: Site = "block",
    at: Sequence[int] | None = None,
    method: Method = "mean",
    batch_size: int = BATCH_SIZE,
) -> SteeringVector:
    """A vector on blocks' outputs, as control vectors are, or on another site; `method` as in `directions`.

    By default on all blocks but the first, as repeng's, which llama.cpp can't change.
    """
    known = [block for block in range(sites.num_blocks) if sites.has(site, block)]
    wanted = _chosen(at, known) if at is not None or site != "block" else known[1:]
    modules = {block: module for block in wanted if (module := sites.module(site, block)) is not None}
    vectors = directions(base, modules, tokenizer, pairs, method=method, batch_size=batch_size)
    return SteeringVector(vectors=vectors, base=identity, site=site)


@torch.no_grad()
def directions(
    base: PreTrainedModel,
    modules: Mapping[int, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    method: Method = "mean",
    batch_size: int = BATCH_SIZE,
) -> dict[int, Tensor]:  # [hidden]  float32, by module
    """What separates the wanted from the unwanted texts in what each module puts out at a text's last token.

    "mean": the mean of wanted - unwanted, so that weight 1 adds the mean difference (contrastive activation addition,
    arXiv 2312.06681). "pca": the first principal component of the differences, and "pca-center" that of both kinds,
    less each pair's middle, of length 1 and pointing to the wanted texts (repeng's "pca_diff" and "pca_center",
    `read_representations`).
    """
    if not pairs:
        raise RequestError("there are no pairs. Give at least one (wanted, unwanted) pair of texts.")
    if method not in METHODS:
        raise RequestError(f"method is {method!r}; known: {list(METHODS)}.")
    if method == "pca" and len(pairs) < 2:
        raise RequestError("one pair has no principal component. Give at least two pairs, or the method 'mean'.")
    states = _last_states(base, modules, tokenizer, [text for pair in pairs for text in pair], batch_size)
    return {layer: _direction(own[::2].double(), own[1::2].double(), method).float() for layer, own in states.items()}


def _direction(wanted: Tensor, unwanted: Tensor, method: Method) -> Tensor:  # [pairs, hidden] each; [hidden]
    difference = wanted - unwanted
    if method == "mean":
        return difference.mean(dim=0)
    # Less each pair's middle, both kinds are half a difference away from 0, on either side.
    seen = difference - difference.mean(dim=0) if method == "pca" else difference
    component = torch.linalg.svd(seen, full_matrices=False).Vh[0]
    ahead = ((difference @ component) > 0).sum() - ((difference @ component) < 0).sum()
    return -component if ahead < 0 else component


def _chosen(at: Sequence[int] | None, known: Sequence[int]) -> list[int]:
    wanted = list(known) if at is None else list(at)
    unknown = [layer for layer in wanted if layer not in known]
    if unknown or not wanted:
        raise RequestError(f"layers {unknown or wanted} don't exist; the base model has {list(known)}.")
    return wanted


def _last_states(
    base: PreTrainedModel,
    modules: Mapping[int, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int,
) -> dict[int, Tensor]:  # [texts, hidden]  by module
    """What the modules put out at each text's last token."""
    kept: dict[int, list[Tensor]] = {layer: [] for layer in modules}
    last = torch.empty(0)

    def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
        states = output[0] if isinstance(output, tuple) else output
        kept[layer].append(states[torch.arange(len(states)), last.to(states.device)].float().cpu())

    def hook(layer: int, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _, args, output: keep(layer, output))

    handles = [hook(layer, module) for layer, module in modules.items()]
    try:
        for ids, mask in _batches(tokenizer, texts, batch_size):
            last = mask.sum(dim=1) - 1
            base.base_model(input_ids=ids.to(base.device), attention_mask=mask.to(base.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


def _batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:  # [texts, tokens] each: ids and mask
    """Texts side by side, filled up on the right."""
    rows = []
    for text in texts:
        rows.append(tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0])
        if len(rows[-1]) == 0:
            raise RequestError(f"the text {text!r} has no tokens. Give texts with at least one.")
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        ids = nn.utils.rnn.pad_sequence(some, batch_first=True)
        lengths = torch.tensor([len(row) for row in some])
        yield ids, (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
