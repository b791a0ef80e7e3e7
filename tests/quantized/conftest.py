"""torchao and hqq are on the path of `make test-quantized` only: elsewhere what needs them isn't collected."""

import importlib.util

import pytest

ELSEWHERE = {name for name in ("torchao", "hqq") if importlib.util.find_spec(name) is None}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    away = [item for item in items if any(mark.args[0] in ELSEWHERE for mark in item.iter_markers("needs"))]
    config.hook.pytest_deselected(items=away)
    items[:] = [item for item in items if item not in set(away)]
