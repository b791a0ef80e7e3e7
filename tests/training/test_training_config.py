"""Every setting that can't be trained with is refused before anything runs."""

from pathlib import Path
from typing import Any

import pytest

from loraplex.adapters.config import LoraConfig
from loraplex.errors import ConfigError, NameFormatError
from loraplex.training import AdapterJob, EvaluationConfig, TrainConfig
from loraplex.training.adapters.config import check_jobs
from loraplex.training.core.config import compose, flat_options


def job(**options: Any) -> AdapterJob:
    defaults: dict[str, Any] = {"name": "a", "data": "a.jsonl", "lora": LoraConfig(target_modules=("q_proj",))}
    return compose(AdapterJob, defaults | {"max_steps": 10} | options, "job")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cubic"}, r"schedule is 'cubic'; choose one of \['constant', 'linear', 'cosine'\]"),
        ({"max_steps": None}, "exactly one"),
        ({"epochs": 2}, "exactly one"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_steps": 2.5}, "max_steps is 2.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"gradient_accumulation": 0}, "gradient_accumulation is 0"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3'"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0"),
        ({"eval_fraction": 1}, "eval_fraction is 1"),
        ({"eval_fraction": -0.1}, "eval_fraction is -0.1"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"max_length": 1}, "max_length is 1"),
        ({"patience": 0}, "patience is 0"),
        ({"patience": 2, "eval_fraction": 0}, "nothing to evaluate"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"name": "a/../b"}, "outside of the output folder"),
        ({"name": "/a"}, "outside of the output folder"),
        ({"lora": LoraConfig()}, "target_modules is None"),
        ({"lora": LoraConfig(target_modules=("q_proj",), lora_dropout=1)}, "lora_dropout is 1"),
    ],
)
def test_refuses_a_job_that_cannot_run(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(**options)


def test_flat_options_go_to_the_parts_that_have_them() -> None:
    options = {"name": "a", "data": "a", "lora": LoraConfig(target_modules=("q",)), "epochs": 2, "warmup_steps": 3}
    made = compose(AdapterJob, options, "job 'a'")
    assert (made.steps.epochs, made.optimizer.warmup_steps, made.evaluation) == (2, 3, EvaluationConfig())
    assert {name: flat_options(made)[name] for name in options} == options
    with pytest.raises(ConfigError, match=r"^job 'a': .*learning_rate is 0"):
        compose(AdapterJob, options | {"learning_rate": 0}, "job 'a'")
    with pytest.raises(TypeError, match="colour"):
        compose(AdapterJob, options | {"colour": 1}, "job 'a'")


def test_refuses_a_name_that_no_adapter_may_have() -> None:
    with pytest.raises(NameFormatError, match="'a:b'"):
        job(name="a:b")


def test_refuses_jobs_that_would_write_to_the_same_place() -> None:
    with pytest.raises(ConfigError, match="no jobs"):
        check_jobs([])
    with pytest.raises(ConfigError, match="two jobs are called 'a'"):
        check_jobs([job(), job()])
    with pytest.raises(ConfigError, match="'a/b' would write into the folder of job 'a'"):
        check_jobs([job(), job(name="a/b")])
    check_jobs([job(name="team/a"), job(name="team/b")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"tokens_per_forward": 0}, "tokens_per_forward is 0"),
        ({"resume": "no"}, "resume is 'no'"),
    ],
)
def test_refuses_a_run_that_cannot_run(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(output=tmp_path, **options)


def test_refuses_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        TrainConfig(output=tmp_path / "file")
