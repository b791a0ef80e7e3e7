"""Adapted modules of a vision tower: how many images a row has, no layout tells."""

import torch
from torch import Tensor

from tests.architectures.variants import make_model
from tests.layers.test_row_order import make_pair
from tests.parity.oracle import PeftOracle, assert_close

IMAGE_TOKEN, TOKENS_PER_IMAGE = 120, 4


def with_images(num_images: list[int]) -> tuple[Tensor, Tensor]:
    """Rows [rows, 12] with so many images each, and the pictures."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(10, 100, (len(num_images), 12), generator=generator)
    for row, count in enumerate(num_images):
        ids[row, 1 : 1 + count * TOKENS_PER_IMAGE] = IMAGE_TOKEN
    return ids, torch.randn(sum(num_images), 3, 28, 28, generator=generator)


def check(model, oracle: PeftOracle, rows: list[str | None], num_images: list[int]) -> None:
    ids, pictures = with_images(num_images)
    mask, types = torch.ones_like(ids), (ids == IMAGE_TOKEN).long()
    logits = model(ids, mask, adapters=rows, pixel_values=pictures, token_type_ids=types).logits
    first = 0
    for row, name in enumerate(rows):
        own = pictures[first : first + num_images[row]]
        first += num_images[row]
        reference = oracle.base if name is None else oracle.model
        if name is not None:
            oracle.model.set_adapter(name)
        given = {"input_ids": ids[row : row + 1], "attention_mask": mask[:1], "token_type_ids": types[row : row + 1]}
        expected = reference(**given, pixel_values=own if len(own) else None).logits[0]
        assert_close(logits[row], expected, f"row {row} ({name})")


@torch.no_grad()
def test_images_of_rows_with_different_adapters_are_right_where_the_tower_is_adapted(tmp_path):
    model, oracle = make_pair(make_model("vlm-gemma3"), tmp_path)
    for rows, num_images in ((["a", "b"], [1, 1]), ([None, "a"], [2, 0]), (["a", None], [0, 1])):
        check(model, oracle, rows, num_images)
    check(model, oracle, ["a", "a"], [2, 1])
    check(model, oracle, ["b"], [1])
    check(model, oracle, [None, None], [1, 2])


@torch.no_grad()
def test_images_in_some_rows_are_right_where_the_tower_is_not_adapted(tmp_path):
    model, oracle = make_pair(make_model("vlm-gemma3"), tmp_path, targets=r".*language_model.*(q_proj|down_proj)")
    check(model, oracle, ["a", None, "b"], [1, 2, 1])
    check(model, oracle, [None, "b", "a"], [0, 1, 0])
