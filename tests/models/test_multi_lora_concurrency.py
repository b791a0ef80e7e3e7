"""Adapters come and go in other threads while requests run: a request keeps the versions it started with."""

import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from loraplex import MultiLoraModel, StoreConfig
from loraplex.errors import AdapterNotFoundError
from loraplex.routing.adapter_spec import AdapterSpec
from tests.tiny_models import VOCAB_SIZE, embedding_target, linear_targets, random_peft_adapter, tiny_model

TIMEOUT_S = 20
IDS = torch.randint(3, VOCAB_SIZE, (4, 12), generator=torch.Generator().manual_seed(0))
ROWS: list[AdapterSpec] = ["a", None, "b:0.6+a", "b"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Adapters a to f, a2 to replace a, and one that adapts modules which no other does."""
    root, base = tmp_path_factory.mktemp("adapters"), tiny_model("llama")
    linears = linear_targets("llama")[:6]

    def write(name: str, seed: int, targets) -> Path:
        return random_peft_adapter(base, root / name, targets=targets, r=2 + seed, seed=seed)

    folders = {name: write(name, seed, linears) for seed, name in enumerate(["a", "b", "c", "d", "e", "f", "a2"])}
    return folders | {"elsewhere": write("elsewhere", 8, ["down_proj", embedding_target("llama"), "lm_head"])}


def make_model(folders: dict[str, Path], names: str, **store: int) -> MultiLoraModel:
    model = MultiLoraModel(tiny_model("llama"), store=StoreConfig(**store))
    for name in names:
        model.load_adapter(name, folders[name])
    return model


class BeforeToken(LogitsProcessor):
    """Calls `act` when a generation is about to choose its token number `step`, or each of them."""

    def __init__(self, act: Callable[[], object], step: int | None = None) -> None:
        self.act, self.step, self.num_calls = act, step, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.step in (None, self.num_calls):
            self.act()
        self.num_calls += 1
        return scores


def generate(model: MultiLoraModel, adapters: list[AdapterSpec], *hooks: BeforeToken, num_tokens: int = 10) -> Tensor:
    processors = LogitsProcessorList(hooks)
    return model.generate(
        IDS[: len(adapters)],
        torch.ones_like(IDS[: len(adapters)]),
        adapters=adapters,
        max_new_tokens=num_tokens,
        do_sample=False,
        logits_processor=processors,
    )


class Outcome(NamedTuple):
    result: object
    error: BaseException | None


def in_another_thread(call: Callable[[], object]) -> object:
    """Run `call` to its end in a new thread; return its result, or raise its error here."""
    outcomes: list[Outcome] = []

    def run() -> None:
        try:
            outcomes.append(Outcome(call(), None))
        except BaseException as error:
            outcomes.append(Outcome(None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(TIMEOUT_S)
    assert outcomes, "the other thread is stuck"
    if outcomes[0].error is not None:
        raise outcomes[0].error
    return outcomes[0].result


def overwrite_freed_memory() -> None:
    """So that a kernel which reads weights that were freed computes something else."""
    gc.collect()
    for _ in range(200):
        torch.full((4096,), 1e9)


def replace(model, folders):
    model.load_adapter("a", folders["a2"], replace=True)


def unload(model, folders):
    model.unload("a")
    model.unload("b")
    overwrite_freed_memory()


def unload_and_load_under_the_same_name(model, folders):
    model.unload("a")
    model.load_adapter("a", folders["a2"])
    overwrite_freed_memory()


def replace_twice_and_use(model, folders):
    replace(model, folders)
    generate(model, ["a"], num_tokens=2)
    model.load_adapter("a", folders["c"], replace=True)
    generate(model, ["a"], num_tokens=2)
    overwrite_freed_memory()


def load_more(model, folders):
    """The first adapter of some modules: they get their layers while the generation runs."""
    model.load_adapter("elsewhere", folders["elsewhere"])
    generate(model, ["elsewhere", None], num_tokens=2)


def use_others_in_the_slots_that_are_left(model, folders):
    for name in "cdef":
        model.load_adapter(name, folders[name])
        generate(model, [name], num_tokens=2)


CHANGES = [
    replace,
    unload,
    unload_and_load_under_the_same_name,
    replace_twice_and_use,
    load_more,
    use_others_in_the_slots_that_are_left,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_during_a_generation_do_not_reach_it(folders, change):
    undisturbed = generate(make_model(folders, "ab"), ROWS)
    model = make_model(folders, "ab", num_slots=4)
    disturb = BeforeToken(lambda: in_another_thread(lambda: change(model, folders)), step=3)
    assert torch.equal(generate(model, ROWS, disturb), undisturbed)
    assert disturb.num_calls == 10


def test_generation_after_a_replacement_gets_the_new_weights(folders):
    model = make_model(folders, "a")
    old = generate(model, ["a"], BeforeToken(lambda: replace(model, folders), step=3))
    new = generate(model, ["a"])
    only_new = make_model(folders, "")
    only_new.load_adapter("a", folders["a2"])
    assert torch.equal(new, generate(only_new, ["a"]))
    assert not torch.equal(new, old)
    assert [(state.version, state.num_leases) for state in model.adapters()] == [(2, 0)]


def test_generation_after_an_unload_is_refused_and_its_slot_is_free(folders):
    model = make_model(folders, "a", num_slots=1)
    generate(model, ["a"], BeforeToken(lambda: model.unload("a"), step=3))
    with pytest.raises(AdapterNotFoundError):
        generate(model, ["a"])
    model.load_adapter("b", folders["b"])
    generate(model, ["b"])


def test_generations_that_interleave_step_by_step_get_their_own_adapters(folders):
    model = make_model(folders, "abcd")
    batches: list[list[AdapterSpec]] = [["a", "b:0.5+c", None, "d"], ["c", "a", "d:2", "b"], [None, None, "a", "a"]]
    alone = [generate(model, adapters) for adapters in batches]
    step = threading.Barrier(len(batches), timeout=TIMEOUT_S)
    together: dict[int, Tensor] = {}

    def run(i: int) -> None:
        together[i] = generate(model, batches[i], BeforeToken(step.wait))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    for i, expected in enumerate(alone):
        assert torch.equal(together[i], expected), f"batch {i}"


def test_adapters_that_load_at_once_attach_each_layer_once(tmp_path, monkeypatch):
    """Both threads find no layer at a module before either attaches one, unless something keeps them apart."""
    base, targets = tiny_model("gpt2"), linear_targets("gpt2")  # whose layers are hooks, which could be there twice
    gpt2_folders = {name: random_peft_adapter(base, tmp_path / name, targets=targets) for name in "ab"}
    model = MultiLoraModel(base)
    module = model.adaptable.modules["transformer.h.0.attn.c_attn"]
    register, both_here = module.register_forward_hook, threading.Barrier(2)

    def register_together(hook, **options):
        with suppress(threading.BrokenBarrierError):
            both_here.wait(0.3)
        return register(hook, **options)

    monkeypatch.setattr(module, "register_forward_hook", register_together)
    threads = [threading.Thread(target=model.load_adapter, args=item) for item in gpt2_folders.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert model.names() == ["a", "b"]
    assert {len(m._forward_hooks) for m in model.adaptable.modules.values()} == {0, 1}


@torch.no_grad()
def test_request_that_sees_a_new_name_gets_its_adapter(tmp_path, monkeypatch):
    """It comes in the moment the store knows the name, before load_adapter has returned."""
    base = tiny_model("gpt2")  # whose layers are attached at a load
    model = MultiLoraModel(base)
    folder = random_peft_adapter(base, tmp_path / "a", targets=linear_targets("gpt2"))
    add, seen = model.store.add, []

    def add_and_use(*args, **kwargs):
        add(*args, **kwargs)
        seen.append(in_another_thread(lambda: model(IDS, adapters=["a"] * 4).logits))

    monkeypatch.setattr(model.store, "add", add_and_use)
    model.load_adapter("a", folder)
    assert torch.equal(seen[0], model(IDS, adapters=["a"] * 4).logits)
    assert not torch.equal(seen[0], model(IDS).logits)


def test_many_threads_that_generate_replace_and_unload_never_mix_versions(folders):
    """Adapter "a" alternates between two versions, "c" comes and goes; "b" must not notice."""
    model = make_model(folders, "ab", num_slots=8)
    old, other = (generate(make_model(folders, "ab"), rows, num_tokens=4) for rows in (["a", "b"], [None, "b"]))
    new_model = make_model(folders, "b")
    new_model.load_adapter("a", folders["a2"])
    allowed = [old, generate(new_model, ["a", "b"], num_tokens=4)]
    wrong: list[Tensor] = []
    done = threading.Event()

    def change() -> None:
        for i in range(12):
            model.load_adapter("a", folders["a2" if i % 2 == 0 else "a"], replace=True)
            model.load_adapter("c", folders["c"])
            model.unload("c")
        done.set()

    def use() -> None:
        while not done.is_set():
            tokens = generate(model, ["a", "b"], num_tokens=4)
            if not any(torch.equal(tokens, expected) for expected in allowed):
                wrong.append(tokens)

    threads = [threading.Thread(target=work) for work in (change, use, use)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5 * TIMEOUT_S)
    assert done.is_set(), "a thread died"
    assert wrong == []
    assert torch.equal(generate(model, [None, "b"], num_tokens=4), other)
