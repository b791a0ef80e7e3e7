"""Vectors, ReFT and gates in forward and generate: what the formulas give each row alone, whatever is beside it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex import MultiLoraModel
from loraplex.errors import BaseModelMismatchError, ConfigError, RequestError
from loraplex.residual import (
    AttentionRequest,
    CaptureRequest,
    FunctionResidual,
    GateResidual,
    SteeringVector,
    parse_positions,
)
from loraplex.residual.positions import PositionSegment, segments
from tests.engine.engines import make_model, write_adapters
from tests.residual.tiny_interventions import (
    expected_answer,
    expected_logits,
    meant,
    random_block_vector,
    random_reft,
)
from tests.tiny_models import random_peft_adapter, tiny_model

ARCHITECTURES = ("llama", "gemma2", "gpt2", "gpt_neox")
TOLERANCE = 1e-4  # of the logits' range
TEXTS = ("all", "prompt", "generated", "f2", "l3", "f2+l3")


def named(text: str) -> str:
    return text.replace("+", "_")


def residuals(base):
    made = {f"block-{named(text)}": random_block_vector(base, 1, "block", parse_positions(text)) for text in TEXTS}
    made |= {f"mlp-{named(text)}": random_block_vector(base, 2, "mlp", parse_positions(text)) for text in TEXTS}
    made |= {"attention-f2": random_block_vector(base, 3, "attention", parse_positions("f2"))}
    made |= {"attention-all": random_block_vector(base, 3, "attention")}
    made |= {f"reft-{named(text)}": random_reft(base, 4, parse_positions(text)) for text in ("f2+l3", "prompt", "all")}
    made |= {"direft": random_reft(base, 5, parse_positions("l1"), subtracts=False)}
    made |= {"reft-mlp": random_reft(base, 6, parse_positions("l2"), site="mlp")}
    return made


CHAINS = (
    *([(name, 1.0)] for name in ("block-all", "mlp-all", "attention-all", "attention-f2", "reft-all", "direft")),
    *([(f"block-{named(text)}", -0.7)] for text in TEXTS[1:]),
    [("reft-f2_l3", 1.0)],
    [("reft-mlp", 0.5)],
    [("block-all", 0.5), ("reft-prompt", 1.0)],
    [("reft-prompt", 1.0), ("block-all", 0.5)],
    [("block-f2", 1.0), ("mlp-generated", 2.0), ("attention-all", 0.3)],
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request, tmp_path_factory):
    model = make_model(request.param, write_adapters(request.param, tmp_path_factory.mktemp("adapters")))
    made = residuals(model.base)
    for name, residual in made.items():
        model.load_residual(name, residual)
    return model, made, tiny_model(request.param)


def spec(chain) -> str:
    return "+".join(f"{name}:{weight}" for name, weight in chain)


def resolved(made, chain):
    return [(made[name], weight) for name, weight in chain]


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(7, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool(((ours - theirs).abs().max() / (theirs.max() - theirs.min())) < TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_gives_each_row_what_it_gets_alone(served, side):
    model, made, base = served
    lengths = [(5, 11, 8, 1, 2)[i % 5] for i in range(len(CHAINS))]
    prompts = [prompt_of(length, i) for i, length in enumerate(lengths)]
    width = max(lengths)
    others = [None, "0", "science", "0:0.5+2"]
    ids, mask = (
        torch.zeros(len(CHAINS) + 4, width, dtype=torch.long),
        torch.zeros(len(CHAINS) + 4, width, dtype=torch.long),
    )
    for row, prompt in enumerate([*prompts, *(prompt_of(width, 90 + i) for i in range(4))]):
        where = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = torch.tensor(prompt), 1
    adapters = [*map(spec, CHAINS), *others]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, adapters=adapters, position_ids=positions).logits
    for row, (chain, prompt) in enumerate(zip(CHAINS, prompts, strict=True)):
        ours = logits[row][mask[row].bool()]
        assert close(ours, expected_logits(base, prompt, resolved(made, chain), len(prompt))), (chain, len(prompt))
    plain = model(ids[-4:], attention_mask=mask[-4:], adapters=others, position_ids=positions[-4:]).logits
    assert close(logits[-4:], plain)


@torch.no_grad()
def test_every_residual_changes_the_logits(served):
    _, made, base = served
    prompt = prompt_of(11, 3)
    plain = expected_logits(base, prompt, [], 11)
    for name in made:
        if "generated" not in name:
            assert not close(expected_logits(base, prompt, [(made[name], 1.0)], 11), plain), name


@pytest.mark.parametrize("packed", [False, None], ids=["transformers' loop", "packed"])
def test_generate_gives_each_row_the_answer_that_it_gets_alone(served, packed):
    model, made, base = served
    prompts = [prompt_of((9, 4, 7)[i % 3], i) for i in range(len(CHAINS))]
    ids, mask = torch.zeros(len(CHAINS), 9, dtype=torch.long), torch.zeros(len(CHAINS), 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = torch.tensor(prompt), 1
    options = {} if packed is None else {"packed": packed}
    out = model.generate(ids, attention_mask=mask, adapters=list(map(spec, CHAINS)), max_new_tokens=5, **options)
    for row, (chain, prompt) in enumerate(zip(CHAINS, prompts, strict=True)):
        answer = expected_answer(base, prompt, resolved(made, chain), 5)
        assert tuple(out[row, 9:].tolist()) == answer, chain


def test_generate_without_a_cache_is_the_same(served):
    model, _, _ = served
    ids = torch.tensor([prompt_of(8, 1)] * len(CHAINS))
    given = {"adapters": list(map(spec, CHAINS)), "max_new_tokens": 4, "packed": False}
    with_cache = model.generate(ids, **given)
    assert model.generate(ids, use_cache=False, **given).equal(with_cache)


def test_rows_of_loras_and_mixtures_link_with_interventions(served):
    model, _, _ = served
    ids = torch.tensor([prompt_of(10, 4)] * 4)
    adapters = ["0", "0+block-all", "science+reft-prompt", "science"]
    with torch.no_grad():
        logits = model(ids, adapters=adapters).logits
        alone = torch.cat([model(ids[:1], adapters=[one]).logits for one in adapters])
    assert close(logits, alone)
    assert not close(logits[0], logits[1])
    assert not close(logits[2], logits[3])


@torch.no_grad()
def test_a_gate_acts_on_what_the_module_and_a_lora_make_together(tmp_path):
    model = make_model("llama", write_adapters("llama", tmp_path), mixtures=False)
    path = "model.layers.0.self_attn.q_proj"
    gate = torch.rand(64) + 0.5
    model.load_residual("gate", GateResidual(outputs={path: gate}))
    ids = torch.tensor([prompt_of(6, 1)])
    ours = model(ids, adapters=["0+gate"]).logits
    handle = model.base.get_submodule(path).register_forward_hook(lambda module, args, y: y * gate)
    theirs = model(ids, adapters=["0"]).logits
    handle.remove()
    assert close(ours, theirs)


@torch.no_grad()
def test_a_gate_acts_behind_an_adapter_that_changes_the_modules_own_weights(tmp_path):
    """Also if that adapter came later."""
    model = MultiLoraModel(tiny_model("llama"))
    path = "model.layers.0.self_attn.q_proj"
    gate = torch.rand(64) + 0.5
    model.load_residual("gate", GateResidual(outputs={path: gate}))
    ids = torch.tensor([prompt_of(6, 1)])
    model(ids, adapters=["gate"])
    options = {"modules_to_save": ["layers.0.self_attn.q_proj"]}
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "own", targets=("v_proj",), seed=1, options=options)
    tensors = load_file(folder / "adapter_model.safetensors")
    own = {name: tensor * 1.7 if "q_proj" in name else tensor for name, tensor in tensors.items()}
    assert any(not own[name].equal(tensors[name]) for name in own)
    save_file(own, folder / "adapter_model.safetensors")
    model.load_adapter("own", folder)
    ours = model(ids, adapters=["own+gate"]).logits
    handle = model.base.get_submodule(path).register_forward_hook(lambda module, args, y: y * gate)
    theirs = model(ids, adapters=["own"]).logits
    handle.remove()
    assert close(ours, theirs)


def test_positions_that_depend_on_the_prompt_need_to_know_it(served):
    model, made, base = served
    ids = torch.tensor([prompt_of(8, 2)])
    with torch.no_grad():
        cache = model(ids[:, :6], adapters=["block-generated"], use_cache=True).past_key_values
        with pytest.raises(RequestError, match="prompt_lengths"):
            model(ids[:, 6:], adapters=["block-generated"], past_key_values=cache)
        request = AttentionRequest(prompt_lengths=[6])
        logits = model(ids[:, 6:], adapters=["block-generated"], past_key_values=cache, attention=request).logits[0]
        assert close(logits, expected_logits(base, ids[0].tolist(), [(made["block-generated"], 1.0)], 6)[6:])


def test_layers_and_positions_are_chosen_when_it_is_loaded():
    model = MultiLoraModel(tiny_model("llama"))
    vector = random_block_vector(model.base, 1)
    model.load_residual("v", vector, layers=[1], positions="l1")
    ids = prompt_of(7, 1)
    kept = SteeringVector(vectors={1: vector.vectors[1]}, base=None, site="block", positions=parse_positions("l1"))
    with torch.no_grad():
        logits = model(torch.tensor([ids]), adapters=["v"]).logits[0]
    assert close(logits, expected_logits(tiny_model("llama"), ids, [(kept, 1.0)], 7))
    with pytest.raises(ConfigError, match="has none"):
        model.load_residual("w", vector, layers=[7])
    with pytest.raises(ConfigError, match="'f7', 'l7'"):
        model.load_residual("w", vector, positions="sometimes")
    assert model.names() == ["v"]


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (SteeringVector(vectors={2: torch.zeros(64)}, base=None, site="block"), r"layers \[2\]"),
        (SteeringVector(vectors={0: torch.zeros(63)}, base=None, site="block"), "hidden size 64"),
        (GateResidual(outputs={"model.layers.0.nothing": torch.ones(64)}), "nothing"),
        (GateResidual(outputs={"model.layers.0.self_attn.k_proj": torch.ones(64)}), "other sizes"),
    ],
)
def test_what_does_not_fit_is_refused(residual, message):
    model = MultiLoraModel(tiny_model("llama"))
    with pytest.raises(BaseModelMismatchError, match=message):
        model.load_residual("v", residual)
    assert model.names() == []


def test_the_base_model_is_given_back(served):
    model, _, base = served
    ids = torch.tensor([prompt_of(8, 2)])
    with torch.no_grad():
        before = model(ids, adapters=["block-all"]).logits
        model.registry.linked.detach()
        assert model.base(ids).logits.equal(base(ids).logits)
        assert not any(
            type(hook).__module__.endswith("residual.sites")
            for m in model.base.modules()
            for hook in m._forward_hooks.values()
        )
        assert model(ids, adapters=["block-all"]).logits.equal(before)


def test_a_vector_on_attention_is_the_same_with_a_capture_and_beside_a_function(served):
    model, _, _ = served
    ids = torch.tensor([prompt_of(8, 2)])
    with torch.no_grad():
        alone = model(ids, adapters=["attention-all:0.5"]).logits
        request = AttentionRequest(capture=CaptureRequest(layers=(0,)))
        captured = model(ids, adapters=["attention-all:0.5"], attention=request).logits
        zero = FunctionResidual(function=lambda hidden, attention, context: hidden * 0)
        model.load_residual("zero", zero, replace=True)
        linked = model(ids, adapters=["attention-all:0.5+zero"]).logits
    assert close(alone, captured)
    assert close(alone, linked)
    assert request.captures[0].residual_norms is not None


@pytest.mark.parametrize("text", [*TEXTS, "f9+l9", "f1+l8"])
@pytest.mark.parametrize("num_prompt", [1, 2, 7, 12])
def test_segments_are_the_positions_of_pyreft(text, num_prompt):
    positions = parse_positions(text)
    for start, stop in ((0, 12), (3, 9), (5, 6)):
        found = [t for own in segments([positions], start, stop, num_prompt) for t in range(own.start, own.stop)]
        assert found == sorted(set(meant(positions, num_prompt, 99 if text == "all" else 12)) & set(range(start, stop)))


def test_segments_tell_what_is_active():
    first, generated = parse_positions("f2"), parse_positions("generated")
    assert segments([first, generated], 0, 9, 7) == [
        PositionSegment(0, 2, frozenset({first})),
        PositionSegment(7, 9, frozenset({generated})),
    ]


@pytest.mark.parametrize("text", ["", "f", "l", "f0", "+", "f2l3", "f2+", "7", None, 7, "l3+f2", "f2+l3+"])
def test_texts_that_are_no_positions_are_refused(text):
    with pytest.raises(ConfigError, match="positions"):
        parse_positions(text)


@pytest.mark.parametrize("text", TEXTS)
def test_positions_are_written_as_they_are_read(text):
    assert str(parse_positions(text)) == text
