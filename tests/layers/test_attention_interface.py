"""Functions before a model's attention: that model goes through them, and nothing else ever changes."""

import ast
import copy
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from loraplex.errors import BaseModelError
from loraplex.layers.attention import interface as attention_interface
from loraplex.layers.attention.check import install_checked
from loraplex.layers.attention.interface import (
    TERMS,
    AttentionCall,
    AttentionFunction,
    AttentionHandle,
    AttentionOutput,
    AttentionOwner,
    attention_functions,
)
from tests.architectures.variants import make_model
from tests.models.untouched import BaseSnapshot
from tests.tiny_models import VOCAB_SIZE, tiny_model

IDS = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))


class Counting:
    """A function that counts its calls, and multiplies the outputs."""

    def __init__(self, owner: AttentionOwner = AttentionOwner.ENGINE, factor: float = 1.0, **options: object) -> None:
        self.order: list[int] = []
        self.factor = factor
        self.function = AttentionFunction(
            name="a test", owner=owner, run=self.run, instead="Do without.", **{"terms": TERMS, **options}
        )

    def run(self, call: AttentionCall) -> AttentionOutput:
        self.order.append(self.function.owner)
        output, weights = call.run_inner()
        return output if self.factor == 1 else output * self.factor, weights


@torch.no_grad()
def logits(base: PreTrainedModel) -> Tensor:
    return base(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_only_the_chosen_model_goes_through_a_function(implementation: str) -> None:
    base, other = tiny_model("llama"), tiny_model("llama")
    for model in (base, other):
        model.set_attn_implementation(implementation)
    before, expected = BaseSnapshot(base), logits(base)
    counting, doubling = Counting(), Counting(factor=2.0)
    handles = [AttentionHandle(base, counting.function), AttentionHandle(base, doubling.function)]
    assert not logits(base).equal(expected)
    assert logits(other).equal(expected)
    assert len(counting.order) == len(doubling.order) == base.config.num_hidden_layers
    before.check_modules()
    for handle in (*handles, handles[0]):
        handle.remove()
    assert logits(base).equal(expected)
    before.check()


def test_functions_stand_by_owner_whatever_the_order_they_came_in() -> None:
    base = tiny_model("llama")
    outer, inner = Counting(AttentionOwner.ENGINE), Counting(AttentionOwner.TRAINING)
    inner.order = outer.order
    for order in ((outer, inner), (inner, outer)):
        handles = [AttentionHandle(base, counting.function) for counting in order]
        outer.order.clear()
        logits(base)
        assert outer.order == [AttentionOwner.ENGINE, AttentionOwner.TRAINING] * base.config.num_hidden_layers
        for handle in handles:
            handle.remove()


def test_a_function_of_two_owners_runs_once_and_leaves_with_the_last_of_them() -> None:
    base, counting = tiny_model("llama"), Counting()
    first, second = AttentionHandle(base, counting.function), AttentionHandle(base, counting.function)
    logits(base)
    assert len(counting.order) == base.config.num_hidden_layers
    first.remove()
    logits(base)
    assert len(counting.order) == 2 * base.config.num_hidden_layers
    second.remove()
    logits(base)
    assert len(counting.order) == 2 * base.config.num_hidden_layers


def test_copies_have_no_functions_and_models_that_end_take_theirs_along() -> None:
    gc.collect()  # what other tests have left
    base, counting = tiny_model("llama"), Counting()
    before = set(attention_interface._installed)
    AttentionHandle(base, counting.function)
    assert len(attention_interface._installed) == len(before) + 1
    logits(copy.deepcopy(base))
    assert counting.order == []
    del base
    gc.collect()
    assert set(attention_interface._installed) == before


def test_what_others_put_in_transformers_place_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionInterface, "get_interface", AttentionInterface.get_interface)  # put back at the end
    base, counting = tiny_model("llama"), Counting()
    handle = AttentionHandle(base, counting.function)
    theirs, asked = AttentionInterface.get_interface, []

    def get_interface(self, name, default):
        asked.append(name)
        return theirs(self, name, default)

    monkeypatch.setattr(AttentionInterface, "get_interface", get_interface)
    handle.remove()
    assert AttentionInterface.get_interface is get_interface
    handle = AttentionHandle(base, counting.function)
    logits(base)
    assert len(counting.order) == len(asked) == base.config.num_hidden_layers
    handle.remove()
    logits(base)
    assert len(counting.order) == base.config.num_hidden_layers


def test_masks_are_made_behind_the_functions_that_have_one() -> None:
    base, made = tiny_model("llama"), []
    own = vars(AttentionMaskInterface).get("__getitem__")

    def mask(former, *args, **options):
        made.append(options["q_length"])
        return former(*args, **options)

    expected = logits(base)
    handle = AttentionHandle(base, Counting(mask=mask).function)
    assert logits(base).equal(expected)
    assert made == [IDS.shape[1]]
    handle.remove()
    assert vars(AttentionMaskInterface).get("__getitem__") is own


@pytest.mark.parametrize("name", ["falcon", "bloom", "gptj", "mamba", "xglm"])
def test_models_whose_attention_goes_another_way_are_refused(name: str) -> None:
    base = make_model(name)
    before = BaseSnapshot(base)
    with pytest.raises(BaseModelError, match="attention interface"):
        install_checked(base, Counting().function)
    before.check()


def test_a_model_some_of_whose_layers_go_another_way_is_refused() -> None:
    base = tiny_model("llama")
    layer = base.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **options: (hidden_states, None)
    before = BaseSnapshot(base)
    with pytest.raises(BaseModelError, match="some layers"):
        install_checked(base, Counting().function)
    before.check()


def test_a_function_that_changes_a_models_results_is_refused() -> None:
    base = tiny_model("llama")
    before, expected = BaseSnapshot(base), logits(base)
    with pytest.raises(BaseModelError, match="other results"):
        install_checked(base, Counting(factor=1 + 2**-20).function)
    before.check()
    assert logits(base).equal(expected)


def test_a_model_that_never_gives_the_same_bits_twice_is_joined() -> None:
    base, counting = tiny_model("llama"), Counting()
    draw = torch.Generator().manual_seed(0)
    base.lm_head.register_forward_hook(lambda module, args, out: out + torch.randn(out.shape, generator=draw) * 1e-6)
    handle, _ = install_checked(base, counting.function)
    counting.order.clear()
    logits(base)
    assert counting.order
    handle.remove()


def test_looking_at_a_model_leaves_its_positions_as_they_were() -> None:
    base = make_model("llama-dynamic-ntk")
    long = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        base(input_ids=long)
    grown = base.model.rotary_emb.inv_freq.clone()
    install_checked(base, Counting().function)[0].remove()
    assert base.model.rotary_emb.inv_freq.equal(grown)


# What transformers gives attention functions that changes nothing, or is in the mask.
HARMLESS = {"attention_mask", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "is_causal", "key", "max_length_k"}
HARMLESS |= {
    "max_length_q",
    "module",
    "output_attentions",
    "position_ids",
    "query",
    "scaling",
    "sliding_window",
    "value",
}


def calls_of_attention(text: str) -> Iterator[ast.Call]:
    """The calls of `attention_interface` in a source, without reading the rest of it."""
    for part in text.split("attention_interface(")[1:]:
        depth, end = 1, 0
        while depth:
            depth += {"(": 1, ")": -1}.get(part[end], 0)
            end += 1
        statement = ast.parse(f"call({part[:end]}").body[0]
        assert isinstance(statement, ast.Expr)
        assert isinstance(statement.value, ast.Call)
        yield statement.value


def test_with_the_last_function_transformers_lookups_are_its_own_again() -> None:
    code = (
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "from tests.tiny_models import tiny_model\n"
        "own = [dict(vars(c)) for c in (AttentionInterface, AttentionMaskInterface)]\n"
        "from loraplex import MultiLoraModel\n"
        "models = [MultiLoraModel(tiny_model('llama')) for _ in range(2)]\n"
        "_ = models[0].registry.linked.layers\n"
        "assert [dict(vars(c)) for c in (AttentionInterface, AttentionMaskInterface)] != own\n"
        "for model in models:\n"
        "    model.close()\n"
        "assert [dict(vars(c)) for c in (AttentionInterface, AttentionMaskInterface)] == own\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_every_term_of_transformers_models_is_known() -> None:
    given: dict[str, str] = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for call in calls_of_attention(path.read_text()):
            given |= {keyword.arg: path.name for keyword in call.keywords if keyword.arg is not None}
    assert {"scaling", "s_aux", "softcap"} <= given.keys()
    assert {term: where for term, where in given.items() if term not in TERMS | HARMLESS} == {}


def test_functions_are_those_of_modules_that_still_are() -> None:
    base = tiny_model("llama")
    counting = Counting()
    handle = AttentionHandle(base, counting.function)
    assert attention_functions(base.model.layers[0].self_attn) == (counting.function,)
    handle.remove()
    assert attention_functions(base.model.layers[0].self_attn) == ()


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "diffllama"])
def test_what_a_function_does_not_compute_is_refused_at_once_for_every_owner(name: str) -> None:
    base = make_model(name)
    before = BaseSnapshot(base)
    for owner in (AttentionOwner.RESIDUALS, AttentionOwner.ENGINE):
        with pytest.raises(BaseModelError, match=r"which a test doesn't know. Do without\."):
            install_checked(base, Counting(owner, terms=frozenset()).function)
    before.check()


def test_a_tensor_under_a_name_that_nobody_knows_is_a_term() -> None:
    base = tiny_model("llama")
    attention = base.model.layers[0].self_attn
    former = attention.forward
    attention.forward = lambda *args, **options: former(*args, tilt=torch.ones(1), **options)
    with pytest.raises(BaseModelError, match="'tilt'"):
        install_checked(base, Counting().function)
