"""A training loop on a tiny model, and a client of it without HTTP."""

import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch

from loraplex import MultiLoraModel
from loraplex.training.service.checkpoints import Checkpoints
from loraplex.training.service.datums import Datum
from loraplex.training.service.local_client import LocalClient
from loraplex.training.service.loop import TrainingLoop
from loraplex.training.service.operations import Done, FailedCall, Operation, Result
from loraplex.training.service.settings import AdamParams, RunSettings, ServiceLimits
from loraplex.training.service.targets import target_modules
from tests.tiny_models import tiny_model

TIMEOUT_S = 120
ADAM = AdamParams(learning_rate=2e-3, beta1=0.9, beta2=0.95, eps=1e-8)


class PickleCodec:
    """Requests and results as they are."""

    def parse(self, kind: str, body: bytes, run_id: str) -> Operation:
        return pickle.loads(body)

    def encode(self, result: Result) -> bytes:
        return pickle.dumps(result)


@contextmanager
def training_loop(
    root: Path, limits: ServiceLimits | None = None, model: MultiLoraModel | None = None
) -> Iterator[TrainingLoop]:
    model = model or MultiLoraModel(tiny_model("llama"))
    loop = TrainingLoop(
        model.base,
        model.adaptable,
        root=root,
        checkpoints=Checkpoints(root),
        codec=PickleCodec(),
        publish=lambda operation, adapter: None,
        limits=limits or ServiceLimits(tokens_per_forward=128),
    )
    try:
        yield loop
    finally:
        loop.close()


class RunClient(LocalClient):
    """One run, named by a number."""

    def __init__(self, loop: TrainingLoop, number: int = 0, *, seq: int = 0, rank: int = 4) -> None:
        modules = target_modules(loop._places._adaptable, attention=True, feed_forward=True, output=True)
        settings = RunSettings(
            run_id=f"s-{number:016x}:train:0",
            owner="anonymous",
            base_model="tiny",
            rank=rank,
            seed=number,
            train_attn=True,
            train_mlp=True,
            train_unembed=True,
            target_modules=modules,
        )
        super().__init__(loop, settings, seq=seq, encode=pickle.dumps)

    def step(self, params: AdamParams = ADAM) -> "Future[bytes]":
        return super().step(params)


def value(future: "Future[bytes]") -> Result:
    return pickle.loads(future.result(TIMEOUT_S))


def done(future: "Future[bytes]") -> Done:
    result = value(future)
    assert isinstance(result, Done), result
    return result


def failure(future: "Future[bytes]") -> FailedCall:
    result = value(future)
    assert isinstance(result, FailedCall), result
    return result


def curve(client: RunClient, steps: int, data: list[Datum]) -> list[float]:
    losses = []
    for _ in range(steps):
        loss, step = client.losses(data, "cross_entropy"), client.step()
        losses.append(value(loss).loss)
        done(step)
    return losses


def make_data(seed: int, lengths: Sequence[int] = (5, 9, 17), *, policy: bool = False) -> list[Datum]:
    """Random tokens; for policy losses with log probabilities of another policy and advantages."""
    draw = torch.Generator().manual_seed(seed)
    data = []
    for length in lengths:
        ids = torch.randint(0, 128, (length + 1,), generator=draw)
        inputs = {"weights": (torch.rand(length, generator=draw) > 0.3).float()}
        if policy:
            inputs = {
                "logprobs": -4 - torch.rand(length, generator=draw),
                "advantages": torch.randn(length, generator=draw),
            }
        data.append(Datum(tokens=ids[:-1].tolist(), targets=ids[1:], inputs=inputs))
    return data
