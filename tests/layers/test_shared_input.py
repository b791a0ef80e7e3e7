"""Modules that read one tensor: seen in one pass, run together in the next, and never with a result for another one."""

import copy

import torch
from torch import Tensor

from loraplex.layers.shared_input import SharedInputs

PLAN = object()


class Recorder:
    """Modules are factors; notes which of them were computed together."""

    def __init__(self) -> None:
        self.shared: SharedInputs[int] = SharedInputs()
        self.runs: list[tuple[int, ...]] = []

    def __call__(self, module: int, x: Tensor, plan: object = PLAN) -> Tensor:
        return self.shared.run(module, x, plan, self._together)

    def _together(self, modules, x, plan):
        self.runs.append(tuple(modules))
        return [module * x for module in modules]

    def layer(self, x: Tensor) -> Tensor:
        """q, k and v of x, and o of their sum."""
        return self(5, self(2, x) + self(3, x) + self(4, x))


def test_those_that_read_one_tensor_run_together_from_the_second_pass_on():
    run, x = Recorder(), torch.randn(4)
    first = run.layer(x)
    assert run.runs == [(2,), (3,), (4,), (5,)]
    run.runs.clear()
    assert torch.equal(run.layer(x + 0), first)
    assert run.runs == [(2, 3, 4), (5,)]


def test_a_module_that_reads_another_tensor_gets_its_own_result_and_ends_the_group():
    run, x, other = Recorder(), torch.randn(4), torch.randn(4)
    run.layer(x)
    run.runs.clear()
    run(2, x)
    assert torch.equal(run(3, other), 3 * other)
    assert run.runs == [(2, 3, 4), (3,)]
    run.runs.clear()
    run(2, x + 0)
    assert run.runs == [(2,)]


def test_a_tensor_changed_in_place_between_two_modules_is_another_one():
    run, x = Recorder(), torch.randn(4)
    run.layer(x)
    run(2, x)
    x.add_(1)
    assert torch.equal(run(3, x), 3 * x)


def test_another_plan_gets_its_own_result():
    run, x = Recorder(), torch.randn(4)
    run.layer(x)
    run.runs.clear()
    run(2, x)
    run(3, x, object())
    assert run.runs == [(2, 3, 4), (3,)]


def test_a_group_whose_last_module_does_not_run_is_given_up():
    run, x = Recorder(), torch.randn(4)
    run.layer(x)
    run(2, x)
    run(3, x)  # 4 does not run in this pass
    run.runs.clear()
    run(2, x + 0)
    run(2, x + 1)
    assert run.runs == [(2, 3, 4), (2,)]


def test_a_copy_has_seen_nothing():
    run = Recorder()
    run.layer(torch.randn(4))
    assert not copy.deepcopy(run.shared)._together
