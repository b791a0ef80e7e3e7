"""Generation with a cache for each pass against whole sequences without any cache."""

import itertools

import pytest
import torch

from loraplex import XLoraConfig
from loraplex.errors import RequestError
from loraplex.xlora.mixture import Mixture
from loraplex.xlora.two_pass.cache import PairedCache
from loraplex.xlora.two_pass.speculation import SpeculationCounts, SpeculativeStep
from loraplex.xlora.two_pass.two_pass import TwoPass
from tests.parity.oracle import assert_close, padded_batch
from tests.tiny_models import VOCAB_SIZE
from tests.xlora.mixed_model import mixed_model

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
CHOICES = ["science", None, "0:0.5+science", "1"]


def uncached_logits(model, sequences, mask, choices, prompt):  # [new tokens, rows, vocab]
    """The logits of every new token, from forward passes over the whole sequence."""
    grown = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
    with torch.no_grad():
        out = model(sequences[:, :-1], attention_mask=grown[:, :-1], adapters=choices, use_cache=False)
    return out.logits[:, prompt - 1 :].transpose(0, 1)


def generated(model, ids, mask, choices, num_tokens, **options):
    return model.generate(
        ids, attention_mask=mask, adapters=choices, max_new_tokens=num_tokens, min_new_tokens=num_tokens, packed=False,
        **GREEDY, **options,
    )  # fmt: skip


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "mistral"))])
def test_every_step_of_200_equals_the_model_without_cache(name, draft, tmp_path):
    model = mixed_model(name, tmp_path)
    ids, mask = padded_batch(len(CHOICES), 8, "left", VOCAB_SIZE)
    out = generated(model, ids, mask, CHOICES, 200, draft=draft)
    expected = uncached_logits(model, out.sequences, mask, CHOICES, 8)
    assert_close(torch.stack(out.logits), expected, f"200 steps, draft={draft}")


@pytest.mark.parametrize("config", [XLoraConfig(scaling_pass_value=0.5), XLoraConfig(scaling_pass_value=None)])
def test_scaling_pass_with_experts_keeps_a_cache_too(config, tmp_path):
    model = mixed_model("llama", tmp_path, config)
    ids, mask = padded_batch(len(CHOICES), 8, "left", VOCAB_SIZE)
    out = generated(model, ids, mask, CHOICES, 20)
    assert_close(torch.stack(out.logits), uncached_logits(model, out.sequences, mask, CHOICES, 8), str(config))


def test_one_shared_cache_would_be_wrong(tmp_path, monkeypatch):
    """A control: the scaling pass reading the main pass's keys and values must show."""
    model = mixed_model("llama", tmp_path)
    ids, mask = padded_batch(1, 8, "left", VOCAB_SIZE)

    def show_main_instead(cache, sequences=None, *, back=0):
        cache.show_main()

    monkeypatch.setattr(PairedCache, "show_scaling", show_main_instead)
    out = generated(model, ids, mask, ["science"], 20, draft=False)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="off by"):
        assert_close(torch.stack(out.logits), uncached_logits(model, out.sequences, mask, ["science"], 8), "shared")


def test_uniform_gates_would_be_wrong(tmp_path, monkeypatch):
    """A control: a mixture whose gates are all 1/n must show."""
    model = mixed_model("llama", tmp_path)
    ids, mask = padded_batch(1, 8, "left", VOCAB_SIZE)
    gates = Mixture.gates
    monkeypatch.setattr(Mixture, "gates", lambda self, s, w: gates(self, torch.full_like(s, 1 / s.shape[-1]), w))
    out = generated(model, ids, mask, ["science"], 20, draft=False)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="off by"):
        assert_close(torch.stack(out.logits), uncached_logits(model, out.sequences, mask, ["science"], 8), "uniform")


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.3, "top_k": 0}])
def test_drafted_and_undrafted_tokens_are_identical(options, tmp_path):
    model = mixed_model("llama", tmp_path)
    ids, mask = padded_batch(3, 8, "left", VOCAB_SIZE)
    choices = ["science", None, "science:0.3"]
    outputs = []
    for draft in (False, True):
        torch.manual_seed(4)
        outputs.append(
            model.generate(
                ids, attention_mask=mask, adapters=choices, max_new_tokens=40, draft=draft, packed=False, **options
            )
        )
    assert outputs[0].tolist() == outputs[1].tolist()
    counts = model.draft_counts
    assert counts.drafted == 2 * 38  # not for the first two new tokens: none, and the one after the prompt
    assert 0 < counts.accepted < counts.drafted


def test_drafting_stops_and_begins_again_between_steps(tmp_path, monkeypatch):
    """Whether a step is drafted may change at any step; the tokens stay the same."""
    model = mixed_model("llama", tmp_path)
    ids, mask = padded_batch(3, 8, "left", VOCAB_SIZE)
    options = {"attention_mask": mask, "adapters": ["science", None, "science:0.3"], "max_new_tokens": 40}
    undrafted = model.generate(ids, draft=False, do_sample=False, **options, packed=False)
    pays = itertools.cycle([True, True, False, True, False, False])
    monkeypatch.setattr(SpeculationCounts, "rate", property(lambda counts: float(next(pays))))
    assert model.generate(ids, do_sample=False, **options, packed=False).tolist() == undrafted.tolist()
    assert 0 < model.draft_counts.drafted < 2 * 38


def test_drafts_that_are_mostly_wrong_are_given_up(tmp_path, monkeypatch):
    model = mixed_model("llama", tmp_path)
    ids, mask = padded_batch(2, 8, "left", VOCAB_SIZE)
    monkeypatch.setattr(TwoPass, "guess", lambda self, hidden: torch.zeros(len(hidden), dtype=torch.int64))
    monkeypatch.setattr(SpeculativeStep, "_guess_of", lambda self, logits: torch.zeros(len(logits), dtype=torch.int64))
    model.generate(
        ids,
        attention_mask=mask,
        adapters=["science"] * 2,
        max_new_tokens=30,
        min_new_tokens=30,
        do_sample=False,
        packed=False,
    )
    assert 0 < model.draft_counts.drafted <= 4


def test_batch_without_a_mask_is_drafted_too(tmp_path):
    model = mixed_model("llama", tmp_path)
    ids, _ = padded_batch(1, 8, "left", VOCAB_SIZE)
    options = {"adapters": ["science"], "max_new_tokens": 20, "do_sample": False}
    drafted = model.generate(ids, **options, packed=False)  # by default, for one row
    assert model.draft_counts.drafted > 0
    assert drafted.tolist() == model.generate(ids, draft=False, **options, packed=False).tolist()


def test_beam_search_reorders_both_caches(tmp_path):
    model = mixed_model("llama", tmp_path)
    ids, mask = padded_batch(3, 8, "left", VOCAB_SIZE)
    options = {"attention_mask": mask, "adapters": ["science", None, "science:-0.5"], "num_beams": 3}
    cached = model.generate(ids, max_new_tokens=15, do_sample=False, **options, packed=False)
    whole = model.generate(ids, max_new_tokens=15, do_sample=False, use_cache=False, **options, packed=False)
    assert cached.tolist() == whole.tolist()


def test_forward_goes_on_with_the_cache_that_it_returned(tmp_path):
    model = mixed_model("llama", tmp_path)
    ids, _ = padded_batch(2, 9, "left", VOCAB_SIZE)
    ids[1] = ids[0]
    choices = ["science", "0"]
    with torch.no_grad():
        first = model(ids[:, :6], adapters=choices, use_cache=True)
        second = model(ids[:, 6:], adapters=choices, past_key_values=first.past_key_values)
        whole = model(ids, adapters=choices, use_cache=False)
    assert_close(torch.cat([first.logits, second.logits], dim=1), whole.logits, "continued")
    with pytest.raises(RequestError, match=r"mixtures on the rows \[0\], but now they are on \[1\]"), torch.no_grad():
        model(ids[:, 6:], adapters=choices[::-1], past_key_values=first.past_key_values)


def test_scalings_are_returned_for_own_tokens_only(tmp_path):
    model = mixed_model("llama", tmp_path)
    ids, mask = padded_batch(3, 8, "left", VOCAB_SIZE)
    choices = [None, "science", "science:2"]
    out, scalings = model.generate(
        ids, attention_mask=mask, adapters=choices, max_new_tokens=5, do_sample=False, return_scalings=True
    )
    assert scalings[0] == ()
    for row in (1, 2):
        (report,) = scalings[row]
        assert report.mixture == "science"
        assert report.experts == ("0", "1", "2")
        assert report.token_ids == tuple(out[row, :-1][-(int(mask[row].sum()) + 4) :].tolist())
        assert torch.allclose(report.values.sum(-1), torch.ones(()))


def test_scalings_are_the_same_without_a_cache(tmp_path):
    model = mixed_model("llama", tmp_path)
    ids, mask = padded_batch(2, 8, "left", VOCAB_SIZE)
    options = {"adapters": ["science", "science:2"], "max_new_tokens": 4, "do_sample": False, "return_scalings": True}
    cached, whole = (model.generate(ids, attention_mask=mask, use_cache=c, **options)[1] for c in (True, False))
    for (one,), (other,) in zip(cached, whole, strict=True):
        assert one.token_ids == other.token_ids
        assert torch.allclose(one.values, other.values, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is set"),
        ({"return_scalings": True, "num_beams": 2}, "a row has several sequences"),
    ],
)
def test_generation_that_mixtures_do_not_support_is_refused(options, message, tmp_path):
    model = mixed_model("llama", tmp_path)
    ids, _ = padded_batch(1, 8, "left", VOCAB_SIZE)
    with pytest.raises(RequestError, match=message):
        model.generate(ids, adapters=["science"], max_new_tokens=3, **options, packed=False)
    model.generate(ids, adapters=["science"], max_new_tokens=3, packed=False)  # the next request runs


def test_an_enabled_log_records_and_never_refuses(tmp_path):
    model = mixed_model("llama", tmp_path)
    ids, _ = padded_batch(1, 8, "left", VOCAB_SIZE)
    model.generate(ids, adapters=["science"], max_new_tokens=3, do_sample=False, packed=False)
    assert len(model.scalings_log) == 0
    model.scalings_log.enable()
    model.generate(ids, adapters=["science"], max_new_tokens=3, do_sample=False, packed=False)
    model.generate(ids, adapters=["science"], max_new_tokens=3, num_beams=2, do_sample=False, packed=False)
    assert [entry.num_tokens for entry in model.scalings_log.entries()] == [10]
