"""What all tests share: no network, few threads, a fixed seed, no skip where all parts are required, the base model."""

import os
import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import numpy as np
import pytest
import torch

from tests.examples import use_profile
from tests.parts import NOT_THIS_MACHINE, REQUIRE_ALL, is_failure, require

use_profile()


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"{NOT_THIS_MACHINE}a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        require(*mark.args)


def fail_if_skipped(report: Any) -> None:
    """Turn a skip into a failure where all parts are required; expected failures are reported as skips, too."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[-1])
        if is_failure(reason):
            report.outcome, report.longrepr = "failed", f"{REQUIRE_ALL}=1, but {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    report = yield
    fail_if_skipped(report)
    return report


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, converted into the user's cache at the first run on a machine."""
    from loraplex.models.checkpoints.smollm2 import convert_smollm2

    require("smollm2")
    return convert_smollm2()
