"""PEFT as the oracle: one row at a time, one adapter at a time."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

LOGIT_TOLERANCE = 1e-4  # of the logit range


class PeftOracle:
    """A base model with some adapters, run by PEFT row by row."""

    def __init__(self, base: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        self.base = base
        names = list(folders)
        self.model = PeftModel.from_pretrained(copy.deepcopy(base), str(folders[names[0]]), names[0]).eval()
        for name in names[1:]:
            self.model.load_adapter(str(folders[name]), name)
        self.model.eval()

    def link(self, name: str, pairs: list[tuple[str, float]]) -> None:
        """A linked row as PEFT knows it: the factors of all adapters side by side."""
        adapters, weights = [n for n, _ in pairs], [w for _, w in pairs]
        self.model.add_weighted_adapter(adapters, weights, name, combination_type="cat")

    @torch.no_grad()
    def logits(self, name: str | None, ids: Tensor, mask: Tensor) -> Tensor:  # [tokens, vocab]
        if name is None:
            return self.base(input_ids=ids[None], attention_mask=mask[None]).logits[0]
        self.model.set_adapter(name)
        return self.model(input_ids=ids[None], attention_mask=mask[None]).logits[0]

    @torch.no_grad()
    def generate(self, name: str | None, ids: Tensor, mask: Tensor, **options: object) -> Tensor:
        if name is None:
            return self.base.generate(ids[None], attention_mask=mask[None], **options)
        self.model.set_adapter(name)
        return self.model.generate(input_ids=ids[None], attention_mask=mask[None], **options)


def assert_close(actual: Tensor, expected: Tensor, label: str) -> None:
    """Equal to 1e-4 of the expected logits' range."""
    span = (expected.max() - expected.min()).item()
    error = (actual - expected).abs().max().item()
    assert error <= LOGIT_TOLERANCE * span, f"{label}: off by {error:.2e}, logits span {span:.2e}"


def padded_batch(num_rows: int, length: int, side: str, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random prompts of different lengths, padded on one side: ids and mask [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (num_rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, num_rows):
        padding = row % (length // 2)
        pad = slice(0, padding) if side == "left" else slice(length - padding, length)
        ids[row, pad], mask[row, pad] = 0, 0
    return ids, mask
