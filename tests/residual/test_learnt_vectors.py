"""Vectors learnt from pairs of texts: what repeng learns, and the mean difference, many texts at once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraplex.errors import RequestError
from loraplex.residual.layers import base_fingerprint
from loraplex.residual.sites import BlockSites
from loraplex.residual.vectors import METHODS, block_vector_from_pairs
from tests.tiny_models import tiny_model

PAIRS = [(f"happy day {i}" * (1 + i % 3), f"sad night {i}") for i in range(6)]


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str, **options: object) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[7 + (ord(c) * 3 + i) % 120 for i, c in enumerate(text)]], dtype=torch.long)}


def learn(method: str, *, batch_size: int = 32, pairs=PAIRS, **options: object):
    base = tiny_model("llama")
    return block_vector_from_pairs(
        base,
        BlockSites(base),
        base_fingerprint(base),
        Letters(),
        pairs,
        method=method,
        batch_size=batch_size,
        **options,
    ).vectors


@pytest.mark.parametrize("method", ["pca", "pca-center"])
def test_principal_components_are_those_of_repeng(method: str) -> None:
    expected = load_file(Path(__file__).parent / "formats" / "expected.safetensors")
    with torch.no_grad():
        plain = tiny_model("llama")(expected["ids"]).logits[0]
    if not torch.allclose(plain, expected["logits.base"], atol=1e-3):
        pytest.skip("this version of torch draws another tiny model than the fixtures were made with")
    name = {"pca": "pca_diff", "pca-center": "pca_center"}[method]
    # Block 0 alone: behind the last block, transformers' hidden_states have the final norm too.
    ours, theirs = learn(method, at=[0])[0], expected[f"learnt.{name}.0"]
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.9999
    assert ours.norm() == pytest.approx(1, abs=1e-4)


def test_the_mean_is_that_of_the_differences_at_the_last_tokens() -> None:
    base = tiny_model("llama")
    states = []
    handle = base.model.layers[1].register_forward_hook(lambda module, args, out: states.append(out[0, -1].double()))
    with torch.no_grad():
        for pair in PAIRS:
            for text in pair:
                base(Letters()(text)["input_ids"])
    handle.remove()
    expected = torch.stack([a - b for a, b in zip(states[::2], states[1::2], strict=True)]).mean(dim=0)
    torch.testing.assert_close(learn("mean")[1].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_texts_side_by_side_give_what_each_gives_alone(method: str) -> None:
    together, alone = learn(method, batch_size=5), learn(method, batch_size=1)
    assert list(together) == [1], "all blocks but the first, as control vectors"
    torch.testing.assert_close(together[1], alone[1], atol=1e-4, rtol=1e-4)


def test_what_can_not_be_learnt_is_refused() -> None:
    with pytest.raises(RequestError, match="two pairs"):
        learn("pca", pairs=PAIRS[:1])
    with pytest.raises(RequestError, match="no pairs"):
        learn("mean", pairs=[])
    with pytest.raises(RequestError, match="known"):
        learn("median")
    with pytest.raises(RequestError, match="don't exist"):
        learn("mean", at=[5])
