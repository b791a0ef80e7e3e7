"""`loraplex train mixture --router linear`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loraplex import LinearRouterConfig, MultiLoraModel
from loraplex.cli.train import train_app
from loraplex.errors import ConfigError
from loraplex.routers.folder import read_router_folder
from tests.tiny_models import tiny_model
from tests.training.mixture.tiny_mixture import FORMS, tiny_sources, write_experts
from tests.training.routers.tiny_router import TARGETS
from tests.training.tiny_jobs import tiny_tokenizer


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A base model, three experts and three data files."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    write_experts(tmp_path, targets=TARGETS)
    tiny_sources(tmp_path)
    return tmp_path


def run(folder: Path, output: str, *more: str) -> Result:
    arguments = ["mixture", "--model", str(folder / "base"), "--output", str(folder / output), "--name", "routed"]
    for form in FORMS:
        arguments += ["--data", f"{form}={folder / form}.jsonl"]
    arguments += ["--steps", "3", "--batch-size", "4", "--eval-every", "2", "--max-length", "200", "--no-plots"]
    return CliRunner().invoke(train_app, [*arguments, *more], catch_exceptions=False)


def experts(folder: Path) -> list[str]:
    names = ",".join(f"{name}={folder}/expert-{number}" for number, name in enumerate("abc"))
    return ["--experts", names]


def test_trains_from_the_command_line_and_on(workplace: Path) -> None:
    options = ["--top-k", "2", "--temperature", "0.5", "--shared", "--z-loss-weight", "0.01"]
    result = run(workplace, "out", "--router", "linear", *experts(workplace), *options, "--load-balance-weight", "0.01")
    assert result.exit_code == 0, result.output
    found = read_router_folder(workplace / "out" / "routed")
    assert found.config == LinearRouterConfig(top_k=2, temperature=0.5, shared=True)
    assert list(found.experts) == ["a", "b", "c"]
    entries = [json.loads(line) for line in (workplace / "out" / "routed.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3]
    assert all(entry["z_loss"] > 0 for entry in entries if "loss" in entry)
    model = MultiLoraModel.from_pretrained(workplace / "base")
    model.load_mixture("routed", workplace / "out" / "routed")
    assert "routed" in model.names()
    more = ["--learning-rate", "1e-6", "--train-experts"]
    start = ["--router", "linear", "--init-from", str(workplace / "out" / "routed")]
    assert run(workplace, "on", *start, *more).exit_code == 0
    model.load_mixture("on", workplace / "on" / "routed")
    routers = [dict(model.mixtures.get(name).router.named_parameters()) for name in ("routed", "on")]  # type: ignore[union-attr]
    moved = [float((routers[0][key] - routers[1][key]).detach().abs().max()) for key in routers[0]]
    assert 0 < max(moved) < 1e-5, "it starts where the first ended"


def test_an_x_lora_teaches_and_gives_its_experts(workplace: Path) -> None:
    head = run(workplace, "xlora", *experts(workplace), "--layerwise-scalings")
    assert head.exit_code == 0, head.output
    teacher = ["--router", "linear", "--teacher", str(workplace / "xlora" / "routed")]
    with pytest.raises(ConfigError, match="say nothing of the experts' factors"):
        run(workplace, "out", *teacher, "--answer-weight", "0", "--train-experts")
    result = run(workplace, "out", *teacher, "--answer-weight", "0.5", "--logit-kl-weight", "1", "--train-experts")
    assert result.exit_code == 0, result.output
    entries = [json.loads(line) for line in (workplace / "out" / "routed.jsonl").read_text().splitlines()]
    for entry in entries:
        loss = entry.get("loss", entry.get("eval_loss"))
        assert loss == pytest.approx(0.5 * entry["answer_loss"] + entry["gate_kl"] + entry["logit_kl"], rel=1e-5)
    assert list(read_router_folder(workplace / "out" / "routed").experts) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--router", "arrow"], "--router is 'arrow'; it can be linear"),
        (["--router", "linear", "--xlora-depth", "2"], "--xlora-depth is for X-LoRA mixtures"),
        (["--router", "linear", "--layout", "peft"], "--layout is for X-LoRA mixtures"),
        (["--top-k", "2"], "--top-k is for mixtures with a linear router. Add --router linear"),
        (["--teacher", "folder"], "--teacher is for mixtures with a linear router"),
        (["--router", "linear", "--top-k", "2", "--top-p", "0.5"], "--top-p is for a softmax over all experts"),
        (["--router", "linear", "--init-from", "folder"], "not both"),
        (["--router", "linear", "--first-weights", "zeros"], "--first-weights is 'zeros'"),
    ],
)
def test_refuses_bad_options_before_anything_is_written(workplace: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(workplace, "out", *experts(workplace), *options)
    assert not (workplace / "out").exists()
