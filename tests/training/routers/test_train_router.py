"""train_mixture with a linear router: what it learns, from whom, what it writes and serves, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex import (
    ArrowConfig,
    Engine,
    EngineConfig,
    LinearRouterConfig,
    MultiLoraModel,
    Request,
    SamplingParams,
    StaticRouterConfig,
    XLoraConfig,
)
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import AdapterExistsError, CheckpointError, ConfigError, MixtureError, TrainingError
from loraplex.training import RouterTrainConfig, TrainResult, train_mixture
from loraplex.training.core import checks
from tests.parity.oracle import assert_close
from tests.training.mixture.tiny_mixture import tiny_config, tiny_data, tiny_sources, write_experts
from tests.training.routers.tiny_router import NAME, TEACHER, XLORA, router_of, tiny_router, tiny_task
from tests.training.tiny_jobs import changed

IDS = torch.tensor([[5, 9, 17, 33, 65, 2, 40, 41]])


def logits(model: MultiLoraModel, name: str = NAME) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS, adapters=[name]).logits
    return out


def train(folder: Path, model: MultiLoraModel, **options: Any) -> TrainResult:
    return train_mixture(model, NAME, tiny_sources(folder), tiny_config(folder / "out", **options))


def entries(result: TrainResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.log.read_text().splitlines()]


@pytest.mark.parametrize("config", [LinearRouterConfig(top_k=2), LinearRouterConfig(activation="sigmoid", shared=True)])
def test_learns_and_serves_what_it_learnt(tmp_path: Path, config: LinearRouterConfig) -> None:
    model = tiny_router(tmp_path, config)
    before = logits(model)
    result = train(tmp_path, model, max_steps=60, first_weights="noise", plots=True)
    assert result.eval_losses[-1] < result.eval_losses[0] - 0.03
    assert (logits(model) - before).abs().max() > 1e-2, "the mixture in memory has not changed"
    assert (tmp_path / "out" / f"{NAME}.png").stat().st_size > 10_000
    model.load_mixture("again", result.folder)
    assert_close(logits(model, "again"), logits(model), "loaded again")
    with Engine(model, EngineConfig()) as engine:
        sampling = SamplingParams(max_tokens=6, ignore_eos=True)
        results = engine.generate([Request(IDS[0].tolist(), adapters=name, sampling=sampling) for name in (NAME, None)])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask, rows = torch.ones(2, IDS.shape[1], dtype=torch.int64), IDS.repeat(2, 1)
    expected = model.generate(rows, attention_mask=mask, adapters=["again", None], packed=False, **options)
    assert [list(found.token_ids) for found in results] == expected[:, IDS.shape[1] :].tolist()


def test_the_log_tells_mean_gates_and_held_out_losses_by_source(tmp_path: Path) -> None:
    result = train(tmp_path, tiny_router(tmp_path), z_loss_weight=0.01, load_balance_weight=0.1, sparsity_weight=0.1)
    steps = [entry for entry in entries(result) if "loss" in entry]
    assert [entry["loss"] for entry in steps] == list(result.train_losses)
    for entry in steps:
        assert sum(entry["gates"].values()) == pytest.approx(1, abs=1e-4)
        assert entry["load_balance"] >= 0.99
        assert entry["z_loss"] > 0
        assert 0 < entry["sparsity"] < 1.1
    (last, *_) = [entry for entry in reversed(entries(result)) if "eval_loss" in entry]
    assert last["sources"].keys() == {"messages", "prompt", "text"}


def test_a_teachers_gates_are_approached(tmp_path: Path) -> None:
    """Far more than a router without gradients would come near them by chance: not at all."""
    model = tiny_router(tmp_path, teacher=XLORA)
    options = {"teacher": TEACHER, "answer_weight": 0.0, "max_steps": 60, "learning_rate": 3e-2}
    result = train(tmp_path, model, first_weights="noise", **options)
    divergences = [entry["gate_kl"] for entry in entries(result) if "eval_loss" in entry]
    steps = [entry for entry in entries(result) if "loss" in entry]
    assert divergences == pytest.approx(result.eval_losses), "what is made small is what is evaluated"
    assert divergences[-1] < 0.3 * steps[0]["gate_kl"]
    assert [entry["loss"] for entry in steps] == pytest.approx([entry["gate_kl"] for entry in steps])
    assert all(entry["answer_loss"] > 0 for entry in steps)


def test_a_teachers_logits_are_approached(tmp_path: Path) -> None:
    write_experts(tmp_path, targets=[("q_proj", "v_proj", "down_proj")] * 3)  # gates can be the teacher's everywhere
    model = tiny_router(tmp_path, teacher=XLORA)
    options = {"teacher": TEACHER, "answer_weight": 0.0, "gate_kl_weight": 0.0, "logit_kl_weight": 1.0}
    result = train(tmp_path, model, first_weights="noise", max_steps=60, learning_rate=1e-2, **options)
    steps = [entry["logit_kl"] for entry in entries(result) if "loss" in entry]
    assert sum(steps[-6:]) < 0.5 * sum(steps[:6])


def test_a_teacher_may_have_its_experts_in_another_order_and_under_its_own_name(tmp_path: Path) -> None:
    """Names without a mixture's own tell which expert is which."""
    model = tiny_router(tmp_path, teacher=XLORA)
    options = {"teacher": TEACHER, "answer_weight": 0.0, "eval_fraction": 0}
    data = tiny_data(tiny_sources(tmp_path), tiny_config(tmp_path / "out", **options))

    def divergence(model: MultiLoraModel, name: str) -> float:
        config = tiny_config(tmp_path / "out", **options | {"teacher": name})
        (loss,) = tiny_task(model, data, config).accumulate_gradients([0])
        return loss.value

    expected = divergence(model, TEACHER)
    model.save_mixture(TEACHER, tmp_path / "saved")
    model.load_mixture("other", tmp_path / "saved")
    weights = [weight.clone() for weight in router_of(model).weights]
    model.unload(NAME)
    model.create_mixture(NAME, ["e2", "e0", "e1"], LinearRouterConfig())
    with torch.no_grad():
        for own, weight in zip(router_of(model).weights, weights, strict=True):
            own.copy_(weight[[2, 0, 1]])
    assert divergence(model, "other") == pytest.approx(expected, rel=1e-5)


def test_experts_train_with_the_router_and_are_saved_and_served(tmp_path: Path) -> None:
    frozen = train(tmp_path, tiny_router(tmp_path), max_steps=20)
    model = tiny_router(tmp_path)
    alone = logits(model, "e1")
    config = tiny_config(tmp_path / "trained", max_steps=20, train_experts=True)
    result = train_mixture(model, NAME, tiny_sources(tmp_path), config)
    assert result.eval_losses[-1] < frozen.eval_losses[-1] - 0.03
    assert (logits(model, "e1") - alone).abs().max() > 1e-2
    model.load_mixture("again", result.folder)
    assert_close(logits(model, "again"), logits(model), "loaded again")


def test_first_weights_are_the_experts_directions_or_small_noise(tmp_path: Path) -> None:
    model = tiny_router(tmp_path)
    data = tiny_data(tiny_sources(tmp_path), tiny_config(tmp_path / "out"))
    kept = [weight.clone() for weight in router_of(model).weights]
    routers = {}
    for kind in ("kept", "noise", "arrow", "spectr"):
        task = tiny_task(model, data, tiny_config(tmp_path / "out", first_weights=kind))
        routers[kind] = task.states[0].router
    assert all(torch.equal(a, b) for a, b in zip(routers["kept"].weights, kept, strict=True))
    assert all(0.02 < float(w.detach().std()) * w.shape[1] ** 0.5 < 0.3 for w in routers["noise"].weights)
    mixture = model.mixtures.get(NAME)
    for expert, name in enumerate(mixture.experts):
        for path, layer in read_adapter(tmp_path / f"expert-{expert}").layers.items():
            _, values, right = torch.linalg.svd((layer.lora_a.t() @ layer.lora_b).t().double())
            module = mixture.modules[mixture.layers.index(path)]
            arrow, spectr = (routers[kind].weights[routers[kind].place[module]][expert] for kind in ("arrow", "spectr"))
            if values[0] > 1.3 * values[1]:  # else the power method has not found it in its 15 steps
                assert abs(float(arrow.double() @ right[0])) > 0.99, f"{name} at {path}"
                assert float(spectr.norm()) == pytest.approx(float(values[0]), rel=0.01)
            assert float(arrow.norm()) == pytest.approx(1, rel=1e-4)
            assert arrow[arrow.abs().argmax()] > 0


def test_patience_and_divergence_keep_good_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MAX_LEARNING_RATE", 1e39)
    model = tiny_router(tmp_path)
    before = logits(model)
    options = {"learning_rate": 1e37, "schedule": "constant", "max_grad_norm": None, "eval_fraction": 0}
    with pytest.raises(TrainingError, match="diverged in step"):
        train(tmp_path, model, **options)
    assert torch.equal(logits(model), before), "the mixture in memory has changed"
    model.load_mixture("good", tmp_path / "out" / f"{NAME}.diverged")
    assert_close(logits(model, "good"), before, "the last good weights")


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train(tmp_path, tiny_router(tmp_path))
    for options, message in (
        ({"z_loss_weight": 0.1}, r"training\.z_loss_weight was 0\.0 and is 0\.1"),
        ({"first_weights": "noise"}, r"mixture\.first weights of the router was"),
        ({"teacher": TEACHER}, "teacher was None and is"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(tmp_path, tiny_router(tmp_path, teacher=XLORA), **options)
    with pytest.raises(CheckpointError, match=r"mixture\.config\.temperature was 1\.0 and is 0\.5"):
        train(tmp_path, tiny_router(tmp_path, LinearRouterConfig(temperature=0.5)))
    (tmp_path / "out" / NAME / "router_config.json").unlink()
    with pytest.raises(AdapterExistsError, match="is not a whole mixture of this kind"):
        train(tmp_path, tiny_router(tmp_path), resume=False)


def test_refuses_what_can_not_be_trained_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny_router(tmp_path, teacher=XLORA)
    sources, config = tiny_sources(tmp_path), tiny_config(tmp_path / "out")

    def refused(kind: type[Exception], message: str, name: str = NAME, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            train_mixture(model, name, sources, changed(config, **options))
        assert not (tmp_path / "out").exists()

    model.create_mixture("arrow", ["e0", "e1"], ArrowConfig())
    model.create_mixture("fixed", ["e0", "e1"], StaticRouterConfig(gates=(0.5, 0.5)))
    model.create_mixture("sigmoid", ["e0", "e1", "e2"], LinearRouterConfig(activation="sigmoid"))
    model.create_mixture("two", ["e0", "e1"], LinearRouterConfig())
    model.create_mixture("all", ["e0", "e1", "e2"], LinearRouterConfig(shared=True))
    refused(MixtureError, "'arrow' has a router without weights", name="arrow")
    refused(MixtureError, "'fixed' has a router without weights", name="fixed")
    refused(ConfigError, "has sigmoids", name="sigmoid", load_balance_weight=0.1)
    refused(ConfigError, "the router is shared", name="all", first_weights="arrow")
    refused(ConfigError, "layout is 'xlora', which is X-LoRA's", layout="xlora")
    refused(ConfigError, "is for mixtures with a linear router", name=TEACHER, train_experts=True)
    refused(MixtureError, "has no scaling head", teacher="two")
    refused(MixtureError, "A teacher's experts must have the names of the router's", name="two", teacher=TEACHER)
    refused(MixtureError, "train_experts would change the expert 'e0'", train_experts=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer_weight": 0.0}, "nothing is learnt"),
        ({"answer_weight": 0.0, "gate_kl_weight": 0.0, "teacher": "t"}, "nothing is learnt"),
        ({"answer_weight": 0.0, "teacher": "t", "train_experts": True}, "say nothing of the experts' factors"),
        ({"logit_kl_weight": 1.0}, "there is no teacher"),
        ({"first_weights": "zeros"}, r"choose one of \['kept', 'noise', 'arrow', 'spectr'\]"),
        ({"train_experts": 1}, "train_experts is 1; it must be True or False"),
        ({"z_loss_weight": -1}, "z_loss_weight is -1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterTrainConfig(**options)


def test_a_teacher_without_the_routers_modules_is_refused(tmp_path: Path) -> None:
    write_experts(tmp_path / "few", targets=(("q_proj",), ("q_proj",), ("q_proj",)))
    (tmp_path / "few").mkdir(exist_ok=True)
    model = tiny_router(tmp_path)
    names = {f"few/e{number}": tmp_path / "few" / f"expert-{number}" for number in range(3)}
    for name, folder in names.items():
        model.load_adapter(name, folder)
    model.create_mixture("few", list(names), XLoraConfig())
    with pytest.raises(MixtureError, match=r"'few' has no scalings for .*v_proj"):
        train(tmp_path, model, teacher="few")
