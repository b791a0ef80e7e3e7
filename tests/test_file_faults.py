"""A disk that is full, a read that fails, a kill: at every call of a load and of a save.

A load fails typed, and what was loaded stays. A file or folder on disk is the old one or the new one, whole.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex import ArrowConfig, MultiLoraModel, StoreConfig, XLoraConfig
from loraplex.adapters.leftovers import restore_replaced
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.errors import LoraplexError
from loraplex.residual.format import read_residual, write_residual
from loraplex.training.adapters.job_state import run_fingerprint
from loraplex.training.adapters.setup import make_states
from loraplex.training.core.checkpoint import load_checkpoint, save_checkpoint
from loraplex.xlora.formats.folders import read_mixture_folder
from loraplex.xlora.scalings.file import read_scalings, write_scalings
from loraplex.xlora.scalings.row_scalings import RowScalings
from tests.file_faults import count_calls, faults, killed_at, points, raising
from tests.residual.tiny_ia3 import write_ia3
from tests.residual.tiny_residuals import random_linked
from tests.tiny_models import random_peft_adapter, tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer

NUM_POINTS = [10, pytest.param(10_000, marks=pytest.mark.slow)]
IDS = torch.arange(5, 12)[None]
FORMATS = Path(__file__).parent / "residual" / "formats"
OTHERS = {"vector": "control.gguf", "reft": "loreft"}
CONFIG = XLoraConfig(xlora_depth=1, layerwise_scalings=True)


@dataclass
class Save:
    """How a thing is written, as version 1 or 2, and which version lies there."""

    path: Path
    write: Callable[[int], object]
    version: Callable[[], int]


def scalings_of(version: int) -> list[RowScalings]:
    values = torch.full((2, 1, 1), float(version))
    return [RowScalings(mixture="m", experts=("a",), layers=("l",), token_ids=(1, 2), values=values)]


def make_save(kind: str, folder: Path) -> Save:
    model, path = MultiLoraModel(tiny_model("llama")), folder / "out" / "thing"
    if kind == "adapter":
        made = [
            read_adapter(random_peft_adapter(model.base, folder / str(i), targets=("q_proj",), r=i)) for i in (1, 2)
        ]
        return Save(
            path,
            lambda version: write_adapter(made[version - 1], path, overwrite=True),
            lambda: read_adapter(path).config.r,
        )
    if kind == "residual":
        layers = model.registry.linked.layers
        residuals = [random_linked(layers, 1, r=rank) for rank in (1, 2)]
        return Save(
            path,
            lambda version: write_residual(residuals[version - 1], path, overwrite=True),
            lambda: read_residual(path).config.r,  # type: ignore[union-attr]
        )
    if kind == "mixture":
        for name in "ab":
            model.load_adapter(name, random_peft_adapter(model.base, folder / name, targets=("q_proj",)))
        for version in (1, 2):
            model.create_mixture(f"m{version}", ["a", "b"][:version], CONFIG)
        return Save(
            path,
            lambda version: model.save_mixture(f"m{version}", path, overwrite=True),
            lambda: read_mixture_folder(path).num_experts,
        )
    if kind == "scalings":
        file = path.with_suffix(".safetensors")
        return Save(
            file,
            lambda version: write_scalings(scalings_of(version), file),
            lambda: int(read_scalings(file)[0].values[0, 0, 0]),
        )
    states = make_states([tiny_job(folder, "j", max_steps=9)], model.base, model.adaptable, tiny_tokenizer())
    identity = run_fingerprint(states, model.base)
    path.mkdir(parents=True)

    def write(version: int) -> None:
        states[0].flat.grad.fill_(1.0)
        states[0].progress.step = version
        states[0].optimizer.step()
        save_checkpoint(path, states, [0], identity)

    def version() -> int:
        load_checkpoint(path, states, identity)
        return states[0].progress.step

    return Save(path, write, version)


SAVES = ["adapter", "residual", "mixture", "scalings", "checkpoint"]


@pytest.mark.parametrize("most", NUM_POINTS)
@pytest.mark.parametrize("kind", SAVES)
def test_save_that_fails_is_typed_and_leaves_the_old_one_or_the_new_one(tmp_path: Path, kind: str, most: int) -> None:
    save = make_save(kind, tmp_path)
    save.write(1)
    count = count_calls(lambda: save.write(2))
    save.write(1)
    failures = []
    for at in points(count, most):
        for code in (errno.ENOSPC, errno.EIO):
            wrong = _failing_save(save, at, code)
            if wrong is not None:
                failures.append(f"call {at} of {count}, {errno.errorcode[code]}: {wrong}")
    assert not failures, "\n".join(failures)
    save.write(2)
    assert save.version() == 2
    left = [path.name for path in save.path.parent.iterdir() if path.name != save.path.name]
    assert not [name for name in left if name.startswith(".") and name.endswith((".old", ".tmp"))]


def _failing_save(save: Save, at: int, code: int) -> str | None:
    ended = "done"
    try:
        with faults(at, raising(code)):
            save.write(2)
    except LoraplexError:
        ended = "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    restore_replaced(save.path)
    try:
        found = save.version()
    except LoraplexError as error:
        return f"what lies there can't be read: {error}"
    if found not in (1, 2) or (ended == "done" and found != 2):
        return f"version {found} lies there, and the save was {ended}"
    save.write(1)
    return None


@pytest.mark.parametrize("most", NUM_POINTS)
@pytest.mark.parametrize("kind", SAVES)
def test_save_that_is_killed_leaves_the_old_one_or_the_new_one(tmp_path: Path, kind: str, most: int) -> None:
    save = make_save(kind, tmp_path)
    save.write(1)
    count = count_calls(lambda: save.write(2))
    save.write(1)
    for at in points(count, most):
        killed_at(lambda: save.write(2), at)
        restore_replaced(save.path)
        assert save.version() in (1, 2), f"call {at} of {count}"
    save.write(2)
    assert save.version() == 2


LOADS = ["adapter", "adapter again", "residual", "vector", "reft", "ia3", "mixture", "router", "scalings", "checkpoint"]


@pytest.mark.parametrize("most", NUM_POINTS)
@pytest.mark.parametrize("kind", LOADS)
def test_load_that_fails_is_typed_and_leaves_what_is_loaded(tmp_path: Path, kind: str, most: int) -> None:
    model = MultiLoraModel(tiny_model("llama"))
    model.load_adapter("kept", random_peft_adapter(model.base, tmp_path / "kept", targets=("q_proj",), seed=1))
    load, unload = _load(kind, model, tmp_path)

    def logits() -> Any:
        with torch.no_grad():
            return model(IDS, adapters=["kept"]).logits

    names, before = model.names(), logits()
    count = count_calls(load)
    unload()
    failures = []
    for at in points(count, most):
        try:
            with faults(at, raising(errno.EIO)):
                load()
            unload()
        except LoraplexError:
            pass
        except Exception as error:
            failures.append(f"call {at} of {count}: {type(error).__name__}: {error}")
        if kind != "adapter again" and model.names() != names:
            failures.append(f"call {at} of {count}: {model.names()} are loaded")
        if not torch.equal(logits(), before):
            failures.append(f"call {at} of {count}: what was loaded has changed")
    assert not failures, "\n".join(failures)
    load()


def _load(kind: str, model: MultiLoraModel, folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """What loads, and what undoes it."""
    new = random_peft_adapter(model.base, folder / "new", targets=("q_proj",), seed=2)
    if kind == "adapter":
        return lambda: model.load_adapter("new", new), lambda: model.unload("new")
    if kind == "adapter again":
        kept = folder / "kept"
        return lambda: model.load_adapter("kept", kept, replace=True), lambda: None
    if kind == "residual":
        write_residual(random_linked(model.registry.linked.layers, 1), folder / "r")
        return lambda: model.load_residual("new", folder / "r"), lambda: model.unload("new")
    if kind in ("vector", "reft", "ia3"):
        source = write_ia3("llama", folder / "ia3")[0] if kind == "ia3" else FORMATS / OTHERS[kind]
        positions = "f1+l1" if kind == "reft" else None
        return lambda: model.load_residual("new", source, positions=positions), lambda: model.unload("new")
    if kind in ("mixture", "router"):
        model.load_adapter("a", new)
        model.create_mixture("m", ["a"], CONFIG if kind == "mixture" else ArrowConfig())
        model.save_mixture("m", folder / "m")
        for name in ("m", "a"):
            model.unload(name)
        return lambda: model.load_mixture("new", folder / "m"), lambda: model.unload("new")
    (folder / "other").mkdir()
    save = make_save(kind, folder / "other")
    save.write(1)
    return save.version, lambda: None


def test_adapter_that_can_not_be_read_back_is_refused_typed_and_served_when_it_can(tmp_path: Path) -> None:
    model = MultiLoraModel(tiny_model("llama"), store=StoreConfig(host_bytes=6_000))
    for name in "ab":
        folder = random_peft_adapter(model.base, tmp_path / name, targets=("q_proj",), seed=ord(name))
        model.load_adapter(name, folder)
    with torch.no_grad():
        expected = {name: model(IDS, adapters=[name]).logits for name in "ab"}
    tiers = {state.name: state.tier for state in model.adapters()}
    assert "disk" in tiers.values(), "the budget holds both"
    failures = []
    for at in range(30):
        away = next(state.name for state in model.adapters() if state.tier == "disk")
        with pytest.MonkeyPatch.context() as patch:
            read_back = partial(failing, at, model.store._read_back)
            patch.setattr(model.store, "_read_back", read_back)
            try:
                with torch.no_grad():
                    model(IDS, adapters=[away])
            except LoraplexError:
                pass
            except Exception as error:
                failures.append(f"call {at}: {type(error).__name__}: {error}")
        with torch.no_grad():
            assert torch.equal(model(IDS, adapters=[away]).logits, expected[away])
    assert not failures, "\n".join(failures)


def failing(at: int, work: Callable[..., object], *args: object) -> object:
    with faults(at, raising(errno.EIO)):
        return work(*args)
