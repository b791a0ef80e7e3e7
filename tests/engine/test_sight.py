"""What a mask rule shows, read off single queries."""

import pytest
import torch

from loraplex.engine.kv.mask_rule import MaskRule, mask_rule_of

LENGTH = 5000
KEYS = torch.arange(LENGTH + 1)


@pytest.mark.parametrize(
    "mask_rule",
    [
        MaskRule(),
        *(MaskRule(window=n) for n in (1, 2, 7, 16, 4096, 4999)),
        *(MaskRule(chunk=n) for n in (2, 3, 16, 2048, 4999)),
    ],
    ids=str,
)
def test_windows_and_chunks_of_any_size_are_found(mask_rule):
    def row(position):
        keys = KEYS[: position + 2]
        return (keys <= position) & (keys >= mask_rule.first(position))

    assert mask_rule_of(row, LENGTH) == mask_rule


def test_what_no_sequence_is_long_enough_for_is_no_window():
    assert mask_rule_of(lambda p: (KEYS[: p + 2] <= p) & (KEYS[: p + 2] > p - LENGTH), LENGTH) == MaskRule()


@pytest.mark.parametrize(
    "shows",
    [
        lambda q, k: k >= 0,  # all tokens
        lambda q, k: (k <= q) & ((k > q - 16) | (k < 4)),  # a window, and the first tokens
        lambda q, k: (k <= q) & (k % 2 == q % 2),
        lambda q, k: (k <= q) & (k > q - 16 - q // 100),  # a window that grows
        lambda q, k: (k <= q) & (k // 16 >= q // 16 - 1),  # the own chunk and the one before
        lambda q, k: k < q,
    ],
)
def test_any_other_rule_is_not_taken_for_one_of_them(shows):
    assert mask_rule_of(lambda p: shows(torch.tensor(p), KEYS[: p + 2]), LENGTH) is None
