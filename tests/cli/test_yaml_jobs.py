"""YAML files of jobs: what the TOML file of the same settings gives, and errors that name line and key."""

from pathlib import Path

import pytest

from loraplex.cli.job_options import make_job, read_job_file
from loraplex.cli.yaml_jobs import read_yaml_jobs
from loraplex.errors import ConfigError

TOML = """
[defaults]
rank = 4
learning_rate = 1e-3
[jobs.a]
data = "a.jsonl"
targets = ["q_proj", "v_proj"]
max_grad_norm = 0.5
rslora = true
after = [["one", 1.0], ["two", 0.5]]
[jobs.b]
data = "b.jsonl"
kind = "residual"
layers = [0, 8]
epochs = 2
gates_before_user = 1.0
"""
YAML = """
defaults:
  rank: 4
  learning_rate: 1e-3  # a text in YAML 1.1
jobs:
  a:
    data: a.jsonl
    targets: [q_proj, v_proj]
    max_grad_norm: 0.5
    rslora: true
    after: [[one, 1.0], [two, 0.5]]
  b: {data: b.jsonl, kind: residual, layers: [0, 8], epochs: 2, gates_before_user: 1}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "jobs.yaml"
    file.write_text(text)
    return file


def test_yaml_gives_the_jobs_of_the_toml_file(tmp_path: Path) -> None:
    (tmp_path / "jobs.toml").write_text(TOML)
    expected, actual = read_job_file(tmp_path / "jobs.toml"), read_yaml_jobs(written(tmp_path, YAML))
    assert actual.keys() == expected.keys()
    for name, settings in expected.items():
        assert repr(make_job(name, actual[name], "base")).replace("[", "(").replace("]", ")") == repr(
            make_job(name, settings, "base")
        ).replace("[", "(").replace("]", ")"), name


def test_values_are_read_as_options_are(tmp_path: Path) -> None:
    text = "jobs:\n  a:\n    data: x\n    targets: q_proj,v_proj\n    max_grad_norm: null\n    layers: 8-10\n"
    settings = read_yaml_jobs(written(tmp_path, text.replace("    layers: 8-10\n", "")))["a"]
    assert (settings["targets"], settings["max_grad_norm"]) == (("q_proj", "v_proj"), None)
    residual = text.replace("    targets: q_proj,v_proj\n", "    kind: residual\n")
    assert read_yaml_jobs(written(tmp_path, residual))["a"]["layers"] == (8, 9, 10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jobs:\n  a:\n    data: x\n    rnak: 4\n", r"jobs\.yaml:4: job 'a' has the unknown setting 'rnak'"),
        ("jobs:\n  a:\n    rank: four\n", r"jobs\.yaml:3: rank is 'four'; it must be a whole number"),
        ("defaults:\n  rank: 0\njobs:\n  a: {data: x}\n", r"jobs\.yaml:2: rank: .*r is 0; a rank must be"),
        ("jobs:\n  a:\n    data: x\n    learning_rate: -1\n", r"jobs\.yaml:4: learning_rate: .*learning_rate is -1"),
        ("jobs:\n  a:\n    steps: 3\n    epochs: 1\n", r"jobs\.yaml:3: steps: .*set exactly one of them"),
        ("jobs:\n  a:\n    dora: 1\n", r"jobs\.yaml:3: dora is '1'; it must be true or false"),
        ("jobs:\n  a:\n    rank: [1]\n", r"jobs\.yaml:3: rank must be a whole number"),
        ("jobs:\n  a:\n    rank: 1\n    rank: 2\n", r"jobs\.yaml:4: job 'a' has 'rank' twice"),
        ("job:\n  a: {}\n", r"jobs\.yaml:1: 'job' is unknown"),
        ("jobs:\n  - a\n", r"jobs\.yaml:2: jobs must be a mapping"),
        ("jobs:\n  a: {data: [\n", r"jobs\.yaml:3: the file of jobs can't be read as YAML"),
        ("", "is empty"),
        ("defaults: {}\n", "has no jobs"),
    ],
)
def test_errors_name_line_and_key(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        read_yaml_jobs(written(tmp_path, text))


def test_a_file_that_would_explode_is_read_in_no_time(tmp_path: Path) -> None:
    layers = ["&a0 [x, x]", *(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    text = "jobs:\n  a:\n    data: x\n    targets: [" + ", ".join(layers) + "]\n"
    with pytest.raises(ConfigError, match=r"jobs\.yaml:4: targets"):
        read_yaml_jobs(written(tmp_path, text))
