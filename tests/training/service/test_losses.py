"""Clients that train at once, against PEFT and torch by hand, each alone: every loss, fifty steps."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from loraplex.errors import RequestError
from loraplex.training.service.datums import Datum
from loraplex.training.service.losses import LOSSES, choose_loss
from loraplex.training.service.operations import LossResult, SaveCheckpoint
from tests.tiny_models import tiny_model
from tests.training.service.loops import ADAM, RunClient, done, make_data, training_loop, value

STEPS = 50
SLOW = ("cispo", "dro", "gspo")  # beside one of each kind: a sum over the tokens' own terms, and clipped ratios
OPTIONS = {"ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.4}, "dro": {"beta": 0.1}}


def with_mask(loss: str, data: list[Datum]) -> list[Datum]:
    if loss != "gspo":
        return data
    return [
        Datum(
            tokens=own.tokens,
            targets=own.targets,
            inputs={**own.inputs, "sequence_ratio_mask": (torch.arange(len(own.tokens)) > 1).float()},
        )
        for own in data
    ]


def by_hand(loss: str, logprobs: Tensor, inputs: dict[str, Tensor], options: dict[str, float]) -> Tensor:
    """The formulas of the Tinker API's documentation."""
    if loss == "cross_entropy":
        return -(logprobs * inputs["weights"]).sum()
    low, high = (0.0, 4.0) if loss == "cispo" else (0.8, 1.2)
    low, high = options.get("clip_low_threshold", low), options.get("clip_high_threshold", high)
    advantages, ratio = inputs["advantages"], torch.exp(logprobs - inputs["logprobs"])
    match loss:
        case "importance_sampling":
            return -(ratio * advantages).sum()
        case "ppo":
            return -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages).sum()
        case "cispo":
            return -(ratio.clamp(low, high).detach() * logprobs * advantages).sum()
        case "dro":
            squares = (logprobs - inputs["logprobs"]) ** 2
            return -(logprobs * advantages - 0.5 * options.get("beta", 0.05) * squares).sum()
        case "gspo":
            marked = inputs["sequence_ratio_mask"] != 0
            of_sequence = (logprobs.detach() - inputs["logprobs"])[marked].mean()
            ratio = torch.exp(of_sequence + logprobs - logprobs.detach())
            return -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages).sum()
    raise AssertionError(loss)


def peft_losses(folder: Path, loss: str, data: list[Datum]) -> tuple[list[float], list[Tensor]]:
    """Losses of each step, and the first step's log probabilities."""
    model = PeftModel.from_pretrained(tiny_model("llama"), folder, is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, ADAM.learning_rate, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps, weight_decay=ADAM.weight_decay
    )
    losses: list[float] = []
    first: list[Tensor] = []
    for _ in range(STEPS):
        total = torch.zeros(())
        for own in data:
            logits = model(torch.tensor([own.tokens])).logits[0]
            logprobs = torch.log_softmax(logits, dim=-1).gather(1, own.targets[:, None])[:, 0]
            total = total + by_hand(loss, logprobs, dict(own.inputs), OPTIONS.get(loss, {}))
            if not losses:
                first.append(logprobs.detach())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    return losses, first


@pytest.mark.parametrize(
    "loss", [pytest.param(loss, marks=[pytest.mark.slow] * (loss in SLOW)) for loss in sorted(LOSSES)]
)
def test_clients_at_once_learn_what_each_learns_with_peft_alone(loss: str, tmp_path: Path) -> None:
    check_clients(loss, {1: (5, 9, 17), 2: (30, 4), 3: (12,)}, tmp_path)


@pytest.mark.slow  # eight curves with PEFT
@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo"])
def test_eight_clients_at_once_learn_what_each_learns_with_peft_alone(loss: str, tmp_path: Path) -> None:
    check_clients(loss, {number: (4 * number, 40 - 3 * number, 7) for number in range(1, 9)}, tmp_path)


def check_clients(loss: str, lengths: dict[int, tuple[int, ...]], tmp_path: Path) -> None:
    """Fifty steps of clients whose data have such lengths, at once, against PEFT and torch, each alone."""
    data = {
        number: with_mask(loss, make_data(number, own, policy=loss != "cross_entropy"))
        for number, own in lengths.items()
    }
    with training_loop(tmp_path) as loop:
        clients = {number: RunClient(loop, number) for number in data}
        for client in clients.values():
            done(client.send(SaveCheckpoint(path=client.path("first"))))
        ours: dict[int, list[LossResult]] = {number: [] for number in data}
        for _ in range(STEPS):
            sent = {n: client.losses(data[n], loss, **OPTIONS.get(loss, {})) for n, client in clients.items()}
            steps = [client.step() for client in clients.values()]
            for number, future in sent.items():
                result = value(future)
                assert isinstance(result, LossResult), result
                ours[number].append(result)
            for step in steps:
                done(step)
    for number, client in clients.items():
        losses, logprobs = peft_losses(loop._checkpoints.folder(client.path("first")), loss, data[number])
        scale = torch.tensor(losses).abs().max()
        found = torch.tensor([result.loss for result in ours[number]])
        torch.testing.assert_close(found, torch.tensor(losses), rtol=1e-4, atol=float(1e-4 * scale))
        for own, expected in zip(ours[number][0].logprobs, logprobs, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_several_targets_at_a_position_are_those_of_the_log_softmax(tmp_path: Path) -> None:
    tokens = [3, 7, 11, 2]
    targets, weights = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]]), torch.rand(4, 2)
    with training_loop(tmp_path) as loop:
        datum = Datum(tokens=tokens, targets=targets, inputs={"weights": weights})
        result = value(RunClient(loop, 1).losses([datum], "cross_entropy"))
    assert isinstance(result, LossResult), result
    with torch.no_grad():
        expected = torch.log_softmax(tiny_model("llama")(torch.tensor([tokens])).logits[0], -1).gather(1, targets)
    torch.testing.assert_close(result.logprobs[0], expected, rtol=1e-4, atol=1e-4)
    assert result.loss == pytest.approx(-float((expected * weights).sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("stable_reinforce", {}, "public"),
        ("custom", {}, "forward_backward_custom"),
        ("mse", {}, "cross_entropy"),
        ("ppo", {"beta": 0.1}, "clip_low_threshold"),
        ("ppo", {"clip_low_threshold": 2.0}, "above"),
        ("dro", {"beta": float("nan")}, "finite"),
        ("dro", {"beta": "large"}, "finite"),
    ],
)
def test_losses_and_options_that_are_not_known_are_refused_by_name(name: str, options: dict, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        choose_loss(name, options)


def test_options_that_a_request_leaves_out_are_those_of_the_documentation() -> None:
    """cispo's weights are bounded above alone: a lower bound would hold on to tokens that the policy has left."""
    found = {name: dict(choose_loss(name, {}).options) for name in LOSSES}
    both = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert found["ppo"] == found["gspo"] == both
    assert found["cispo"] == {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}
    assert found["dro"] == {"beta": 0.05}
    assert choose_loss("cispo", {"clip_high_threshold": 8.0}).options["clip_high_threshold"] == 8
