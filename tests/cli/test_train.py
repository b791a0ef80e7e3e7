"""`loraplex train adapters`."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loraplex.cli.job_options import make_job, merge_options, read_job_file
from loraplex.cli.train import train_app
from loraplex.errors import ConfigError
from tests.tiny_models import tiny_model
from tests.training.tiny_jobs import records, tiny_tokenizer, write_records


def jobs_from(options: dict[str, list[str]], from_file: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    merged = merge_options(from_file or {}, options)
    return {name: make_job(name, settings, "base") for name, settings in merged.items()}


def test_one_value_holds_for_all_jobs_and_named_values_for_one() -> None:
    options = {"data": ["a=a.jsonl", "b=b.jsonl"], "rank": ["b=4", "8"], "learning_rate": ["1e-2"], "targets": ["x,y"]}
    jobs = jobs_from(options)
    assert (jobs["a"].lora.r, jobs["b"].lora.r) == (8, 4)
    assert (jobs["a"].lora.lora_alpha, jobs["b"].lora.lora_alpha) == (16, 8)
    assert jobs["a"].optimizer.learning_rate == jobs["b"].optimizer.learning_rate == 1e-2
    assert jobs["a"].lora.target_modules == ("x", "y")
    assert (jobs["a"].steps.max_steps, jobs["a"].lora.base_model_name_or_path) == (300, "base")


def test_options_replace_what_the_file_of_jobs_says(tmp_path: Path) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(
        "[defaults]\nrank = 4\nepochs = 2\n"
        "[jobs.a]\ndata = 'a.jsonl'\ntargets = ['q_proj']\n"
        "[jobs.b]\ndata = 'b'\nrank = 6\n"
    )
    jobs = jobs_from({"data": ["c=c.jsonl"], "seed": ["3"], "targets": ["b=all-linear"]}, read_job_file(file))
    assert {name: (job.lora.r, job.steps.epochs) for name, job in jobs.items()} == {
        "a": (4, 2),
        "b": (6, 2),
        "c": (16, None),
    }
    assert jobs["a"].lora.target_modules == ("q_proj",)
    assert jobs["b"].lora.target_modules == "all-linear"
    assert {job.seed for job in jobs.values()} == {3}


def test_a_job_may_train_a_residual_and_stand_last_in_a_link() -> None:
    options = {"data": ["a=x", "b=y"], "kind": ["a=residual"], "layers": ["a=0,8-10"], "after": ["b=one+two:0.5"]}
    jobs = jobs_from(options)
    assert (jobs["a"].lora, jobs["a"].residual.layers) == (None, (0, 8, 9, 10))
    assert (jobs["b"].residual, jobs["b"].lora.target_modules) == (None, ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert (list(jobs["a"].after), jobs["b"].after) == ([], [("one", 1.0), ("two", 0.5)])


def test_a_job_may_train_loreft() -> None:
    options = {"data": ["a=x", "b=y"], "kind": ["loreft"], "layers": ["a=0,8-10"], "positions": ["b=l1"]}
    jobs = jobs_from(options)
    assert (jobs["a"].lora, jobs["a"].residual, jobs["a"].reft.r) == (None, None, 4)
    assert (jobs["a"].reft.layers, str(jobs["a"].reft.positions)) == ((0, 8, 9, 10), "f7+l7")
    assert (jobs["b"].reft.layers, str(jobs["b"].reft.positions)) == (None, "l1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ["a=x"], "kind": ["loreft"], "alpha": ["8"]}, "alpha"),
        ({"data": ["a=x"], "kind": ["loreft"], "positions": ["last"]}, "positions are 'last'"),
        ({"data": ["a=x"], "positions": ["l1"]}, "positions"),
        ({"data": []}, "nothing to train"),
        ({"data": ["a.jsonl"]}, "write NAME=FILE"),
        ({"data": ["a=x", "a=y"]}, "names the job 'a' twice"),
        ({"data": ["a=x"], "rank": ["b=3"]}, r"--rank 'b=3' names the job 'b', but the jobs are \['a'\]"),
        ({"data": ["a=x"], "batch_size": ["many"]}, "--batch-size is 'many'; it must be a whole number"),
        ({"data": ["a=x"], "steps": ["0"]}, "max_steps is 0"),
        ({"data": ["a=x"], "kind": ["dora"]}, r"kind is 'dora'; choose one of \['lora', 'loreft', 'residual'\]"),
        ({"data": ["a=x"], "kind": ["residual"], "dropout": ["0.1"]}, r"a residual, which has no \['dropout'\]"),
        ({"data": ["a=x"], "kind": ["residual"], "layers": ["a-b"]}, "must be layer numbers such as 0,8-10"),
        ({"data": ["a=x"], "after": ["there:much"]}, "must be folders such as"),
    ],
)
def test_refuses_options_that_say_nothing_usable(options: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        jobs_from(options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[jobs.a]\ncolour = 1", r"\[jobs.a\] has the unknown settings \['colour'\]"),
        ("[defaults]\nrank = 1", r"needs \[jobs.NAME\]"),
        ("[job.a]\ndata = 'a'", r"has the tables \['job'\]"),
        ("rank", "can't be read as TOML"),
    ],
)
def test_refuses_a_file_of_jobs_with_unknown_content(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_job_file(file)


@pytest.mark.parametrize("setting", ["kind = 'residual'\nlayers = 5", "targets = 5"])
def test_a_job_of_the_file_with_a_number_in_the_place_of_a_list_is_refused(tmp_path: Path, setting: str) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(f"[jobs.a]\ndata = 'x'\n{setting}\n")
    with pytest.raises(ConfigError, match="is 5"):
        jobs_from({}, read_job_file(file))


def test_a_job_of_the_file_needs_data(tmp_path: Path) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text("[jobs.a]\nrank = 2\n")
    with pytest.raises(ConfigError, match="job 'a' has no data"):
        jobs_from({}, read_job_file(file))


def test_trains_from_the_command_line(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for name in ("a", "b"):
        write_records(tmp_path / f"{name}.jsonl", records("messages", 12, ord(name)))
    arguments = [
        "adapters",
        "--model",
        str(tmp_path / "base"),
        "--output",
        str(tmp_path / "out"),
        "--max-length",
        "128",
    ]
    arguments += ["--data", f"a={tmp_path / 'a.jsonl'}", "--data", f"b={tmp_path / 'b.jsonl'}", "--rank", "b=2"]
    arguments += ["--steps", "4", "--steps", "b=2", "--batch-size", "2", "--eval-every", "2", "--no-plots"]
    result = CliRunner().invoke(train_app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert (tmp_path / "out" / "a" / "adapter_model.safetensors").exists()
    assert len((tmp_path / "out" / "b.jsonl").read_text().splitlines()) == 3
    assert "held-out" in result.output


def test_texts_of_the_file_are_read_as_the_options_are(tmp_path: Path) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(
        "[jobs.a]\ndata = 'x'\nlearning_rate = '1e-3'\nmax_grad_norm = 'none'\neval_records = 'none'\n"
        "after = 'one+two:0.5'\ndora = 'true'\n[jobs.b]\ndata = 'y'\nkind = 'residual'\nlayers = '0,8-10'\n"
    )
    jobs = jobs_from({}, read_job_file(file))
    a, b = jobs["a"], jobs["b"]
    assert (a.optimizer.learning_rate, a.optimizer.max_grad_norm, a.evaluation.eval_records) == (1e-3, None, None)
    assert (list(a.after), a.lora.use_dora) == ([("one", 1.0), ("two", 0.5)], True)
    assert b.residual.layers == (0, 8, 9, 10)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data = 5", r"\[jobs.a\] data is 5; it must be a text"),
        ("data = 'x'\ndora = 1", r"\[jobs.a\] dora is 1; it must be true or false"),
        ("data = 'x'\nrank = 'four'", r"\[jobs.a\] rank is 'four'; it must be a whole number\."),
        ("data = 'x'\nafter = 5", "after is 5; it must be a list of pairs"),
        ("data = 'x'\nafter = ['runs/a']", r"after has 'runs/a'; each entry is a folder.*such as \('runs/a', 1\.0\)"),
        ("data = 'x'\nafter = [['runs/a', 'much']]", r"after has \['runs/a', 'much'\]"),
    ],
)
def test_a_setting_of_the_file_of_another_kind_is_refused(tmp_path: Path, setting: str, message: str) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(f"[jobs.a]\n{setting}\n")
    with pytest.raises(ConfigError, match=message):
        jobs_from({}, read_job_file(file))
