"""The grid of mixtures inside vLLM against PEFT, in one batch with base, adapter and linked rows."""

import pytest

from tests.vllm.worlds import CHOICES, TOLERANCE, Difference, difference, engine, prompts, scaling_pass

NUM_TOKENS = 6


@pytest.fixture(scope="module")
def llm(world):
    options = {"mixtures": True}
    sizes = {"max_loras": 16, "max_cpu_loras": 24, "max_lora_rank": 32}  # for links of two mixtures
    with engine(world, options, **sizes, enable_prefix_caching=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def rows():
    return list(zip(CHOICES, prompts(len(CHOICES)), strict=True))


@pytest.mark.vllm_smoke
def test_every_row_equals_pefts(llm, world, rows):
    found = difference(llm, world, rows, NUM_TOKENS)
    assert found.num_tokens == len(rows) * NUM_TOKENS
    assert found.is_none, found


def test_rows_that_come_and_go_equal_pefts(llm, world, rows):
    """Other neighbours, other slots: the last rows first, then all again."""
    found = difference(llm, world, rows[::-1][:5], NUM_TOKENS)
    assert found.is_none, found
    found = difference(llm, world, [*rows[:3], *rows[7:]], NUM_TOKENS)
    assert found.is_none, found


def only_mixtures(rows, without_value=False):
    chosen = [row for row in rows if row[0] is not None and row[0].startswith("mix")]
    return chosen if not without_value else chosen[:6]  # those with scaling_pass_value 0


@pytest.mark.vllm_smoke
def test_control_with_one_shared_cache_is_noticed(llm, world, rows, monkeypatch):
    """Tokens alone may still match: it is the log-probabilities that show it."""
    cache = scaling_pass(llm).cache
    registry = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    monkeypatch.setattr(cache, "copies", {name: registry[name] for name in cache.copies})
    monkeypatch.setattr(cache, "names", {name: name for name in cache.names})
    found = difference(llm, world, only_mixtures(rows), NUM_TOKENS)
    assert found.largest > 10 * TOLERANCE, found


def test_control_with_uniform_gates_is_noticed(llm, world, rows, monkeypatch):
    import torch

    from loraplex.vllm_plugin import gates

    monkeypatch.setattr(gates, "kept_scalings", lambda scalings, config: torch.full_like(scalings, 1 / 3))
    found = difference(llm, world, only_mixtures(rows, without_value=True), NUM_TOKENS)
    assert found.largest > 10 * TOLERANCE, found


def test_links_with_mixtures_equal_loraplexs_own(llm, world):
    """PEFT has no links with mixtures: loraplex's own model is the reference."""
    import torch

    from loraplex import MultiLoraModel
    from tests.vllm.worlds import TOP, Answer, generate

    model = MultiLoraModel.from_pretrained(world.model, dtype="float32")
    for name, folder in world.adapters.items():
        model.load_adapter(name, folder)
    for name in ("mix1", "mix4", "mix6"):
        model.load_mixture(name, world.named / name)
    choices = ["mix1:0.7+protein:0.3", "mix6:0.5+materials", "mix1:0.4+mix4:0.6", "protein:2"]
    links = list(zip(choices, prompts(len(choices), seed=3), strict=True))
    found = Difference()
    for (choice, prompt), answer in zip(links, generate(llm, links, NUM_TOKENS), strict=True):
        ids = torch.tensor([[*prompt, *answer.tokens]])
        logits = model(input_ids=ids, adapters=[choice]).logits[0, len(prompt) - 1 : -1]
        best = torch.log_softmax(logits.float(), dim=-1).topk(TOP)
        tops = [dict(zip(i, p, strict=True)) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        found.add(answer, Answer(best.indices[:, 0].tolist(), tops))
    assert found.is_none, found
