"""The training loop: what fails fails alone, what was taken is carried out once, in order, also after a kill."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from loraplex import MultiLoraModel
from loraplex.errors import QueueFullError, RequestError
from loraplex.training.service.checkpoints import CheckpointPath, Checkpoints
from loraplex.training.service.datums import Datum, DatumLimits, check_datums
from loraplex.training.service.losses import choose_loss
from loraplex.training.service.operations import LoadCheckpoint, LossResult, RefusedCall, SaveCheckpoint
from loraplex.training.service.passes import TrainingPasses
from loraplex.training.service.settings import AdamParams, ServiceLimits
from tests.tiny_models import tiny_model
from tests.training.service.loops import RunClient, curve, done, failure, make_data, training_loop, value

LIMITS = ServiceLimits(tokens_per_forward=128, snapshot_steps=3)


def test_requests_are_carried_out_by_their_numbers_and_once(tmp_path: Path) -> None:
    data = make_data(1)
    with training_loop(tmp_path) as loop:
        expected = curve(RunClient(loop, 1), 3, data)
    with training_loop(tmp_path / "again") as loop:
        client = RunClient(loop, 1)
        for seq in (4, 6, 2, 5, 3, 1):  # steps before the losses that they are for
            for _ in range(2):  # a second time is the same request
                client.seq = seq - 1
                client.losses(data, "cross_entropy") if seq % 2 else client.step()
        assert [value(loop.result(client.id, seq)).loss for seq in (1, 3, 5)] == expected


def test_a_bad_request_fails_alone(tmp_path: Path) -> None:
    data = make_data(2)
    bad = Datum(tokens=data[0].tokens, targets=data[0].targets, inputs={"weights": torch.full((5,), 3e38)})
    with training_loop(tmp_path) as loop:
        alone = curve(RunClient(loop, 1), 3, data)
    with training_loop(tmp_path / "others") as loop:
        client, other = RunClient(loop, 1), RunClient(loop, 2)
        found = []
        for _ in range(3):
            refused = client.send(RefusedCall(RequestError("no")))
            good = client.losses(data, "cross_entropy")
            spoiled = client.losses([*data, bad], "cross_entropy")
            others = other.losses([bad], "cross_entropy")
            step = client.step()
            assert failure(refused).message == "no"
            assert "data[3]" in failure(spoiled).message
            assert failure(others).by_user
            found.append(value(good).loss)
            done(step)
    assert found == pytest.approx(alone, rel=1e-5)


def test_a_pass_that_fails_is_tried_again_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run = make_data(3), TrainingPasses.run
    with training_loop(tmp_path) as loop:
        alone = curve(RunClient(loop, 1), 2, data)

    def fails_for_long_rows(self, rows, adapters, *, backward):
        results = run(self, rows, adapters, backward=backward)  # the gradients are there already
        if any(len(row.datum.tokens) == 60 for row in rows):
            raise RuntimeError("no memory")
        return results

    monkeypatch.setattr(TrainingPasses, "run", fails_for_long_rows)
    with training_loop(tmp_path / "others") as loop:
        client, other = RunClient(loop, 1), RunClient(loop, 2)
        found = []
        for _ in range(2):
            too_long = other.losses(make_data(4, (60,)), "cross_entropy")
            loss, step = client.losses(data, "cross_entropy"), client.step()
            found.append(value(loss).loss)
            done(step)
            assert not failure(too_long).by_user
        assert torch.count_nonzero(loop.queue(other.id).run.gradient) == 0
    assert found == pytest.approx(alone, rel=1e-5)


def test_steps_without_finite_gradients_leave_the_weights(tmp_path: Path) -> None:
    data = make_data(5)
    huge = Datum(tokens=data[2].tokens, targets=data[2].targets, inputs={"weights": torch.full((17,), 1e36)})
    with training_loop(tmp_path) as loop:
        client = RunClient(loop, 1)
        before = value(client.losses(data, "cross_entropy", backward=False)).loss
        for _ in range(2):
            client.losses([huge], "cross_entropy")
        assert "not finite" in failure(client.step()).message
        assert value(client.losses(data, "cross_entropy", backward=False)).loss == before
        done(client.step(AdamParams(grad_clip_norm=1.0)))


def test_checkpoints_are_peft_folders_and_bring_back_everything(tmp_path: Path) -> None:
    data = make_data(6)
    with training_loop(tmp_path) as loop:
        client = RunClient(loop, 1)
        curve(client, 3, data)
        done(client.send(SaveCheckpoint(path=client.path("a"))))
        after = curve(client, 3, data)
        other = RunClient(loop, 2)
        done(other.send(LoadCheckpoint(client.path("a"), optimizer=True)))
        assert curve(other, 3, data) == pytest.approx(after, rel=1e-6)
        fresh = RunClient(loop, 3)
        done(fresh.send(LoadCheckpoint(client.path("a"), optimizer=False)))
        weights_alone = curve(fresh, 3, data)
        assert weights_alone[0] == pytest.approx(after[0], rel=1e-6)
        assert weights_alone[1:] != pytest.approx(after[1:], rel=1e-6)
        assert "no checkpoint" in failure(client.send(LoadCheckpoint(client.path("b"), optimizer=False))).message
        assert "already" in failure(client.send(SaveCheckpoint(path=client.path("a")))).message
        done(client.send(SaveCheckpoint(path=client.path("a"), overwrite=True)))
        done(other.send(SaveCheckpoint(path=other.path("at-three"))))
    folder = Checkpoints(tmp_path).folder(CheckpointPath(other.id, "weights", "at-three"))
    ids = torch.tensor([data[2].tokens])
    expected = PeftModel.from_pretrained(tiny_model("llama"), folder)(ids).logits
    served = MultiLoraModel(tiny_model("llama"))
    served.load_adapter("trained", folder)
    torch.testing.assert_close(served(ids, adapters=["trained"]).logits, expected, rtol=1e-4, atol=1e-4)


def test_runs_that_leave_memory_come_back_as_they_were(tmp_path: Path) -> None:
    data = make_data(7)
    with training_loop(tmp_path) as loop:
        expected = curve(RunClient(loop, 1), 6, data)
    limits = ServiceLimits(tokens_per_forward=128, max_runs=1, idle_s=1)
    with training_loop(tmp_path / "small", limits) as loop:
        client = RunClient(loop, 1)
        found = curve(client, 3, data)
        stop = time.monotonic() + 60
        while loop.num_runs()[0] and time.monotonic() < stop:
            time.sleep(0.1)
        assert loop.num_runs() == (0, 0)
        assert not loop.waits_for_place(client.id)
        found += curve(client, 3, data)
    assert found == pytest.approx(expected, rel=1e-6)


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    data = make_data(8, (5,))
    with training_loop(tmp_path, ServiceLimits(tokens_per_forward=128, max_queued=2)) as loop:
        client = RunClient(loop, 1)
        done(loop.result(client.id, 0))
        with pytest.raises(RequestError, match="seq_id"):
            client.send(RefusedCall(RequestError("x")), seq=10**6)
        client.seq = 1  # the first is missing, so that nothing is carried out
        for _ in range(2):
            client.losses(data, "cross_entropy")
        with pytest.raises(QueueFullError, match="max_queued"):
            client.losses(data, "cross_entropy")


def test_what_a_process_leaves_behind_goes_on_wherever_it_ended(tmp_path: Path) -> None:
    """Snapshots that were not written yet, a record that is cut short: the curve is that of one process."""
    steps, data = 10, make_data(9)
    with training_loop(tmp_path / "whole", LIMITS) as loop:
        expected = curve(RunClient(loop, 1), steps, data)
    found: list[float] = []
    for stop in (1, 2, 5, 7, steps):
        with training_loop(tmp_path / "parts", LIMITS) as loop:
            client = RunClient(loop, 1)
            client.seq = 2 * len(found)
            found += curve(client, stop - len(found), data)
            loop._writer.close(drop=True)
        log = tmp_path / "parts" / client.id / "requests.log"
        with log.open("ab") as file:
            file.write(log.read_bytes()[:40])
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow  # processes that import torch
def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    """Killed at several moments, between snapshots too; the curve is that of a run without kills."""
    steps = 10
    with training_loop(tmp_path / "whole", LIMITS) as loop:
        expected = curve(RunClient(loop, 1), steps, make_data(9))
    program = "from tests.training.service.test_loop import train_on; train_on({folder!r}, {steps})"
    found: dict[int, float] = {}
    for _ in range(steps):  # each time at least one step more: the last one that is known is asked for again
        command = [sys.executable, "-c", program.format(folder=str(tmp_path / "killed"), steps=steps)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
        assert process.stdout is not None
        for told, line in enumerate(process.stdout, 1):
            number, loss = line.split()
            found[int(number)] = float(loss)
            if told == 2 and int(number) < steps - 1:
                process.send_signal(signal.SIGKILL)
        process.wait()
        if len(found) == steps:
            break
    assert [found[number] for number in range(steps)] == pytest.approx(expected, rel=1e-4)


def train_on(folder: str, steps: int) -> None:
    """Go on with a run's steps from wherever it is, as a client does that sends again what wasn't answered."""
    with training_loop(Path(folder), LIMITS) as loop:
        client = RunClient(loop, 1)
        data = make_data(9)
        known = max((seq for seq in range(2 * steps + 1) if loop.queue(client.id).knows(seq)), default=0)
        for number in range(max(0, known - 1) // 2, steps):
            client.seq = 2 * number
            loss = client.losses(data, "cross_entropy")
            step = client.step()
            print(number, value(loss).loss, flush=True)
            done(step)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens": []}, "0 tokens"),
        ({"tokens": [1] * 300}, "300 tokens"),
        ({"tokens": [1, 2, 128]}, "token 128"),
        ({"targets": torch.tensor([1, -1, 2])}, "token -1"),
        ({"targets": torch.tensor([1, 2])}, "shape"),
        ({"targets": torch.zeros(3, 65, dtype=torch.long)}, "64"),
        ({"inputs": {"weights": torch.tensor([1.0, float("nan"), 1.0])}}, "finite"),
        ({"inputs": {"weights": torch.ones(2)}}, "shape"),
        ({"inputs": {"advantages": torch.ones(3)}}, "advantages"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused_by_place_and_name(change: dict, told: str) -> None:
    whole = {"tokens": [1, 2, 3], "targets": torch.tensor([2, 3, 4]), "inputs": {"weights": torch.ones(3)}}
    limits = DatumLimits(max_length=256, max_tokens=1000, num_embeddings=128, num_logits=128)
    loss = choose_loss("cross_entropy", {})
    check_datums([Datum(**whole)], loss, limits)
    with pytest.raises(RequestError, match=told) as raised:
        check_datums([Datum(**whole), Datum(**{**whole, **change})], loss, limits)
    assert "data[1]" in str(raised.value)


def test_losses_of_a_model_that_serves_too_are_those_of_the_model_alone(tmp_path: Path) -> None:
    data = make_data(10)
    with training_loop(tmp_path) as loop:
        expected = curve(RunClient(loop, 1), 3, data)
    model = MultiLoraModel(tiny_model("llama"))
    model.generate(torch.arange(3, 9)[None], max_new_tokens=2)
    with training_loop(tmp_path / "serves", model=model) as loop:
        result = value(RunClient(loop, 1).losses(data, "cross_entropy"))
        assert isinstance(result, LossResult)
        assert result.loss == pytest.approx(expected[0], rel=1e-6)
