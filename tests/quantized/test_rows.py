"""Rows of every kind on a quantized base, against PEFT on the same base; and a row alone is what it is in a batch."""

import pytest
import torch

from loraplex import Engine, MultiLoraModel, Request, SamplingParams, XLoraConfig
from loraplex.residual.layers import AttentionLayers
from tests.hook_oracle import hooked, residual_hook
from tests.parity.oracle import PeftOracle, padded_batch
from tests.parity.xlora_oracle import peft_logits, peft_xlora
from tests.quantized.bases import KINDS, TOLERANCE, assert_near, kinds, load, with_stands, write_adapters, write_plain
from tests.residual.tiny_residuals import random_linked, random_vector
from tests.tiny_models import VOCAB_SIZE

LINK = "small:0.7+large:-0.4"
PEFT_ROWS = {None: None, "small": "small", "large": "large", LINK: "link", "rs": "rs"}
RESIDUAL_ROWS = ("ra", "small+ra:0.5+v")
ROWS = (*PEFT_ROWS, "science", "science:0.5+small", *RESIDUAL_ROWS)
NEW_TOKENS = 8


class Case:
    """One kind of base, PEFT on it, and our model."""

    def __init__(self, kind, folder):
        plain = write_plain(folder / "plain")
        folders = write_adapters(plain, folder)
        self.base = load(plain, kind)
        self.peft = PeftOracle(self.base, folders)
        self.peft.link("link", [("small", 0.7), ("large", -0.4)])
        experts = {"0": folders["small"], "1": folders["large"]}
        config = XLoraConfig(xlora_depth=2, xlora_size=16, layerwise_scalings=True)
        self.mixture = peft_xlora(with_stands(self.base), experts, config, seed=5)
        self.model = MultiLoraModel(load(plain, kind))
        for name, path in folders.items():
            self.model.load_adapter(name, path)
        self.model.create_mixture("science", ["small", "large"], config)
        state = self.mixture.base_model.internal_xlora_classifier.state_dict()
        self.model.mixtures.get("science").head.load_state_dict(state)
        self.eager = load(plain, kind)
        self.eager.set_attn_implementation("eager")
        layers = AttentionLayers(self.eager)
        self.layers, self.linked = layers.layers, random_linked(layers, 1)
        self.model.load_residual("ra", self.linked)
        self.model.load_residual("v", random_vector(layers, 2))

    @torch.no_grad()
    def expected(self, row, ids):
        """The logits [tokens, vocab] of a row's tokens, by PEFT or the residual's formula."""
        if row == "science":
            return peft_logits(self.mixture, ids)[0]
        if row == "ra":
            hooks = [(layer.path, residual_hook(n, [(self.linked, 1.0)])) for n, layer in self.layers.items()]
            with hooked(self.eager, hooks):
                return self.eager(input_ids=ids[None], use_cache=False).logits[0]
        return self.peft.logits(PEFT_ROWS[row], ids, torch.ones_like(ids))


@pytest.fixture(scope="module", params=kinds(*KINDS, "hqq"))
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def real(ids, mask, row):
    return ids[row][mask[row] == 1]


@torch.no_grad()
def test_logits_of_every_row_equal_those_of_the_row_alone(case):
    ids, mask = padded_batch(len(ROWS), 12, "left", VOCAB_SIZE)
    logits = case.model(ids, mask, adapters=list(ROWS)).logits
    for row, choice in enumerate(ROWS):
        found = logits[row][mask[row] == 1]
        alone = case.model(real(ids, mask, row)[None], adapters=[choice]).logits[0]
        assert_near(found, alone, f"{choice} alone")
        if choice in (*PEFT_ROWS, "science", "ra"):
            assert_near(found, case.expected(choice, real(ids, mask, row)), f"{choice} against its oracle")


@torch.no_grad()
def test_rows_differ(case):
    """Guards the test above: if adapters did nothing, everything would be equal."""
    ids, _ = padded_batch(1, 12, "left", VOCAB_SIZE)
    logits = case.model(ids.expand(len(ROWS), -1), adapters=list(ROWS)).logits
    span = logits.max() - logits.min()
    for a in range(len(ROWS)):
        for b in range(a):
            assert (logits[a] - logits[b]).abs().max() > 10 * TOLERANCE * span, (ROWS[a], ROWS[b])


def assert_greedy(case, row, prompt, tokens):
    """Each token is the oracle's best after those before it; near ties may go either way."""
    logits = case.expected(row, torch.cat([prompt, tokens[:-1]]))[len(prompt) - 1 :]
    span = (logits.max() - logits.min()).item()
    for place, token in enumerate(tokens):
        assert logits[place].max() - logits[place, token] <= TOLERANCE * span, f"{row}, token {place}"


@pytest.mark.parametrize("packed", [pytest.param(True, marks=pytest.mark.needs("compiler")), False])
def test_greedy_tokens_of_every_row_are_those_of_its_oracle(case, packed):
    rows = [choice for choice in ROWS if not packed or choice not in RESIDUAL_ROWS]  # whose passes aren't packed
    ids, mask = padded_batch(len(rows), 12, "left", VOCAB_SIZE)
    tokens = case.model.generate(ids, mask, adapters=rows, max_new_tokens=NEW_TOKENS, do_sample=False, packed=packed)
    for row, choice in enumerate(rows):
        if choice in (*PEFT_ROWS, "science", "ra"):
            assert_greedy(case, choice, real(ids, mask, row), tokens[row, 12:])


def test_the_engine_gives_the_tokens_of_the_oracles(case):
    ids, mask = padded_batch(len(ROWS), 12, "left", VOCAB_SIZE)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    requests = [
        Request(real(ids, mask, row).tolist(), adapters=choice, sampling=sampling) for row, choice in enumerate(ROWS)
    ]
    with Engine(case.model) as engine:
        results = engine.generate(requests)
    for row, (choice, result) in enumerate(zip(ROWS, results, strict=True)):
        assert result.error is None, f"{choice}: {result.error}"
        if choice in (*PEFT_ROWS, "science", "ra"):
            assert_greedy(case, choice, real(ids, mask, row), torch.tensor(result.token_ids))
