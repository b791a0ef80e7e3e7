"""What clients of the training service may cost: memory, disk, and each other's time."""

import errno
import threading
import time
from pathlib import Path

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.errors import OutputError, QueueFullError
from loraplex.training.service import places
from loraplex.training.service.checkpoints import CheckpointPath, CheckpointRecord, Checkpoints
from loraplex.training.service.journal import Journal, JournalRecord
from loraplex.training.service.losses import choose_loss
from loraplex.training.service.operations import LoadCheckpoint, SaveCheckpoint
from loraplex.training.service.passes import LossRow, TrainingPasses
from loraplex.training.service.run_queue import RunQueue
from loraplex.training.service.settings import RunSettings, ServiceLimits
from tests.tiny_models import tiny_model
from tests.training.service.loops import RunClient, curve, done, make_data, training_loop, value


def test_runs_that_are_only_asked_about_have_no_weights_in_memory(tmp_path: Path, monkeypatch) -> None:
    """The weights come with a place, so that many runs of many clients don't fill the memory after a restart."""
    data = make_data(1)
    with training_loop(tmp_path, ServiceLimits(tokens_per_forward=128, snapshot_steps=1)) as loop:
        client = RunClient(loop, 1)
        value(client.losses(data, "cross_entropy"))
        done(client.step())
    read = []
    snapshot = Journal.snapshot

    def noted(self, *, with_tensors=True):
        found = snapshot(self, with_tensors=with_tensors)
        read.append(len(found.tensors))
        return found

    monkeypatch.setattr(Journal, "snapshot", noted)
    with training_loop(tmp_path) as loop:
        again = RunClient(loop, 1, seq=2)
        assert done(loop.result(again.id, 2)).fields["metrics"]["step:max"] == 1
        assert read == [0]
        assert loop.num_runs() == (0, 0)
        value(again.losses(data, "cross_entropy"))
        assert loop.num_runs()[0] == 1
        assert read[1] > 0


def test_a_loaded_checkpoint_may_be_deleted_whatever_becomes_of_the_process(tmp_path: Path) -> None:
    data = make_data(2)
    with training_loop(tmp_path) as loop:
        first = RunClient(loop, 1)
        value(first.losses(data, "cross_entropy"))
        done(first.step())
        done(first.send(SaveCheckpoint(path=first.path("a"))))
        other = RunClient(loop, 2)
        done(other.send(LoadCheckpoint(first.path("a"), optimizer=True)))
        expected = value(other.losses(data, "cross_entropy", backward=False)).loss
        Checkpoints(tmp_path).delete(first.path("a"))
        loop._writer.close(drop=True)  # as a kill would
    with training_loop(tmp_path) as loop:
        again = RunClient(loop, 2, seq=2)
        assert done(loop.result(again.id, 1)).fields["type"] == "load_weights"
        assert value(again.losses(data, "cross_entropy", backward=False)).loss == pytest.approx(expected, rel=1e-6)


def test_a_run_whose_process_ended_before_its_first_request_begins_when_it_comes_again(tmp_path: Path) -> None:
    with training_loop(tmp_path) as loop:
        RunClient(loop, 1)
        (tmp_path / "s-0000000000000001:train:0" / "requests.log").unlink(missing_ok=True)
        (tmp_path / "s-0000000000000001:train:0" / "state.safetensors").unlink(missing_ok=True)
    with training_loop(tmp_path) as loop:
        client = RunClient(loop, 1)
        assert done(loop.result(client.id, 0)).fields["type"] == "create_model"


def test_a_request_that_does_not_fit_on_the_disk_hides_none_behind_it(tmp_path: Path, monkeypatch) -> None:
    journal = Journal.create(tmp_path / "run", _settings())
    journal.append(JournalRecord(1, "x", b"first"))
    opened = Path.open

    def full(self, *arguments, **options):
        file = opened(self, *arguments, **options)
        write = file.write

        class Full:
            def write(self, content):
                write(content[:30])
                raise OSError(errno.ENOSPC, "No space left on device")

            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

        return Full()

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(OutputError):
            journal.append(JournalRecord(2, "x", b"second" * 20))
    journal.append(JournalRecord(3, "x", b"third"))
    assert [record.body for record in Journal(tmp_path / "run").records()] == [b"first", b"third"]


def test_runs_whose_client_is_done_leave_memory_and_come_back_if_need_be(tmp_path: Path) -> None:
    data = make_data(5)
    with training_loop(tmp_path, ServiceLimits(tokens_per_forward=128, idle_s=3600)) as loop:
        client = RunClient(loop, 1)
        first = value(client.losses(data, "cross_entropy", backward=False)).loss
        assert loop.num_runs() == (1, 0)
        loop.release([client.id, "s-0000000000000009:train:0"])
        stop = time.monotonic() + 60
        while loop.num_runs_of("anonymous") and time.monotonic() < stop:
            time.sleep(0.05)
        assert loop.num_runs() == (0, 0)
        assert value(client.losses(data, "cross_entropy", backward=False)).loss == pytest.approx(first, rel=1e-6)


def test_more_runs_at_work_than_places_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never pauses doesn't keep the only place; neither notices the other in its curve."""
    monkeypatch.setattr(places, "_TURN_S", 0.2)
    data, steps = make_data(6, (5,)), 4
    with training_loop(tmp_path / "alone") as loop:
        expected = {number: curve(RunClient(loop, number), 40, data) for number in (1, 2)}
    with training_loop(tmp_path / "both", ServiceLimits(tokens_per_forward=128, max_runs=1)) as loop:
        busy, other = RunClient(loop, 1), RunClient(loop, 2)
        found: list[float] = []
        is_done = threading.Event()

        def never_pause() -> None:
            while not is_done.is_set() and len(found) < 40:
                found.extend(curve(busy, 1, data))

        thread = threading.Thread(target=never_pause)
        thread.start()
        others = curve(other, steps, data)
        is_done.set()
        thread.join()
    assert others == pytest.approx(expected[2][:steps], rel=1e-5)
    assert found == pytest.approx(expected[1][: len(found)], rel=1e-5)


def test_requests_of_one_key_leave_room_for_those_of_others(tmp_path: Path) -> None:
    data = make_data(3, (5,))
    limits = ServiceLimits(tokens_per_forward=128, max_all_queued_bytes=4000)
    with training_loop(tmp_path, limits) as loop:
        clients = [RunClient(loop, number) for number in range(1, 5)]
        for client in clients:
            done(loop.result(client.id, 0))
            client.seq = 1  # the first is missing, so that nothing is carried out

        def send_all() -> None:
            for client in clients:
                client.losses(data, "cross_entropy")

        with pytest.raises(QueueFullError, match="max_all_queued_bytes"):
            send_all()
        assert sum(loop.queue(client.id).held_bytes for client in clients) <= 2000


def test_the_oldest_results_go_and_the_newest_stays(tmp_path: Path) -> None:
    queue = RunQueue(Journal(tmp_path), _settings(), ServiceLimits(max_kept=3, max_kept_bytes=100))
    for seq, size in enumerate((10, 10, 10, 10, 95, 300)):
        queue._accept(JournalRecord(seq, "x", b""), None)
        queue.settle(seq, bytes(size))
        if seq == 3:
            assert list(queue.kept(9)) == [1, 2, 3]
    assert list(queue.kept(9)) == [5]
    assert queue.result(0) is None
    assert len(queue.result(5).result()) == 300


def test_sampling_clients_weights_on_disk_are_those_in_use(tmp_path: Path) -> None:
    """A reference that is asked all the time stays, however many steps' weights come after it."""
    checkpoints, run_id = Checkpoints(tmp_path), "s-0000000000000001:train:0"
    with training_loop(tmp_path / "runs") as loop:
        client = RunClient(loop, 1)
        done(loop.result(client.id, 0))
        adapter = loop.queue(client.id).run.adapter()
    for number in range(30):
        path = CheckpointPath(run_id, "sampler_weights", f"_at-{number}")
        checkpoints.write(adapter, _record(path, number))
        checkpoints.touch(CheckpointPath(run_id, "sampler_weights", "_at-0"))
        checkpoints.drop_unlisted(run_id)
    left = {folder.name for folder in (tmp_path / run_id / "sampler_weights").iterdir()}
    assert left == {"_at-0", *(f"_at-{number}" for number in range(15, 30))}


def test_a_datum_longer_than_a_pass_has_the_same_loss_and_gradient_with_less_kept() -> None:
    (datum,) = make_data(4, (60,))
    found = []
    for tokens_per_forward in (128, 16):
        model = MultiLoraModel(tiny_model("llama"))
        parameters = [parameter.requires_grad_() for parameter in model.base.parameters()]
        passes = TrainingPasses(model.base, tokens_per_forward)
        kept = []

        def note(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            (result,) = passes.run([LossRow(0, datum, choose_loss("cross_entropy", {}))], [{}], backward=True)
        found.append((result.loss, [parameter.grad for parameter in parameters], sum(kept)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])
    assert found[1][2] < found[0][2]


def _settings() -> RunSettings:
    return RunSettings(
        run_id="s-1:train:0",
        owner="a",
        base_model="tiny",
        rank=4,
        seed=0,
        train_attn=True,
        train_mlp=True,
        train_unembed=True,
        target_modules=("q_proj",),
    )


def _record(path: CheckpointPath, seq: int) -> CheckpointRecord:
    return CheckpointRecord(
        path=str(path),
        owner="a",
        created=0.0,
        seq=seq,
        rank=4,
        base_model="tiny",
        train_attn=True,
        train_mlp=True,
        train_unembed=True,
        listed=False,
    )
