"""What a run leaves beside the adapters."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from loraplex.adapters.prompt_centroid import read_centroid
from loraplex.models.auto.prompt_states import background_tokens, fit_centroids, prompt_tokens
from loraplex.training import AdapterJob, TrainConfig, train_adapters
from loraplex.training.core import bars
from loraplex.training.core.plots import running_mean
from loraplex.training.data.records import read_records
from tests.tiny_models import tiny_model
from tests.training.tiny_jobs import records, tiny_job, tiny_tokenizer, write_records


def train(jobs: list[AdapterJob], output: Path, plots: bool = False) -> None:
    train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=jobs, config=TrainConfig(output=output, plots=plots))


def test_leaves_folders_in_peft_format_logs_plots_and_a_checkpoint(tmp_path: Path) -> None:
    train([tiny_job(tmp_path, "a"), tiny_job(tmp_path, "b", max_steps=3)], tmp_path / "out", plots=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("a", "a.jsonl", "a.png", "b", "b.jsonl", "b.png", "checkpoint.safetensors")
    }
    assert {path.name for path in (tmp_path / "out" / "a").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "loraplex.json", "prompt_centroid.safetensors"),
        "README.md",
    }
    assert (tmp_path / "out" / "a.png").read_bytes().startswith(b"\x89PNG")
    settings = json.loads((tmp_path / "out" / "a" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["r"]) == ("CAUSAL_LM", 4)


def test_centroids_are_those_of_the_prompts_and_can_be_left_out(tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.jsonl", records("messages", 12))
    texts = write_records(tmp_path / "no-prompts.jsonl", records("text", 12))
    jobs = [tiny_job(tmp_path, "a", data=data, eval_fraction=0), tiny_job(tmp_path, "texts", data=texts)]
    train(jobs, tmp_path / "out")
    tokenizer = tiny_tokenizer()
    prompts = [record.messages[:1] for record in read_records(data) if record.messages is not None]
    rows = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    expected = fit_centroids(tiny_model("llama"), {"a": rows}, background_tokens(tokenizer))["a"]
    found = read_centroid(tmp_path / "out" / "a")
    assert found is not None
    assert found.num_prompts == 12
    assert torch.allclose(found.mean, expected.mean, atol=1e-5)
    assert torch.allclose(found.background, expected.background, atol=1e-5)
    assert read_centroid(tmp_path / "out" / "texts") is None, "texts have no prompts"
    config = TrainConfig(output=tmp_path / "without", plots=False, prompt_centroids=False)
    train_adapters(tiny_model("llama"), tokenizer, jobs=jobs[:1], config=config)
    assert read_centroid(tmp_path / "without" / "a") is None


def test_the_log_has_every_step_and_evaluation_in_order(tmp_path: Path) -> None:
    train([tiny_job(tmp_path, "a", max_steps=7, eval_every=3, warmup_steps=2, schedule="linear")], tmp_path / "out")
    log = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 7]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [3, 6, 7]
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert rates == pytest.approx([0, 0.0025, 0.005, 0.004, 0.003, 0.002, 0.001])
    assert all(entry["grad_norm"] > 0 and entry["tokens"] > 0 for entry in log if "loss" in entry)


def test_long_records_are_counted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = [{"prompt": "x" * 90, "completion": "yes"}] * 3
    data = write_records(tmp_path / "data.jsonl", records("prompt", 9) + long)
    job = tiny_job(tmp_path, "a", data=data, max_length=40, eval_fraction=0, max_steps=1)
    config = TrainConfig(output=tmp_path / "out", plots=False)
    (result,) = train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)
    assert result.num_truncated == 3
    assert "3 of the 12 records" in caplog.text
    assert result.eval_losses == ()


def test_without_a_terminal_lines_of_the_log_tell_how_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bars, "LOG_SECONDS", 0.0)
    caplog.set_level("INFO", "loraplex")
    jobs = [tiny_job(tmp_path, "protein", max_steps=22, eval_every=5), tiny_job(tmp_path, "b", max_steps=3)]
    train(jobs, tmp_path / "out")
    lines = [record.getMessage() for record in caplog.records if record.name == bars.logger.name]
    steps = [int(line.split()[1]) for line in lines]
    assert steps == [1, 3, 5, 10, 15, 20, 22]
    losses = [json.loads(line) for line in (tmp_path / "out" / "protein.jsonl").read_text().splitlines()]
    (tenth,) = [entry["loss"] for entry in losses if entry["step"] == 10 and "loss" in entry]
    (held_out,) = [entry["eval_loss"] for entry in losses if entry["step"] == 10 and "eval_loss" in entry]
    assert f"step 10 of 22: loss protein {tenth:.3f} (held out {held_out:.3f}); b " in lines[3]
    assert lines[3].endswith("tokens/s")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_are_drawn_on_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(bars, "Console", lambda stderr: Console(file=screen, force_terminal=is_terminal, width=120))
    train([tiny_job(tmp_path, "protein")], tmp_path / "out")
    assert ("protein" in screen.getvalue()) == is_terminal
    assert ("10/10" in screen.getvalue()) == is_terminal


def test_running_mean_follows_without_the_pull_of_a_start_value() -> None:
    assert running_mean([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert running_mean([1.0] * 100 + [2.0])[-1] == pytest.approx(1.1, abs=1e-3)
