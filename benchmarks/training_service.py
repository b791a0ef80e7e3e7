"""How much faster do clients of the training service train at once than one after the other?

python benchmarks/training_service.py       # 4 and 8 clients, 2 records each a step

Each client sends its records' losses and an optimizer step, waits for both, and goes on, as a loop of the Tinker SDK
does, but without HTTP. One round is one step of every client; sides alternate. `--clock cpu` counts processor time.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import alternate, console, medians, print_table, save

from loraplex import MultiLoraModel
from loraplex.adapters.config import LoraConfig
from loraplex.training.adapters.config import AdapterJob
from loraplex.training.adapters.data import load_job_data
from loraplex.training.core.config import EvaluationConfig, StepsConfig
from loraplex.training.service.checkpoints import Checkpoints
from loraplex.training.service.datums import Datum
from loraplex.training.service.journal import JournalRecord
from loraplex.training.service.loop import TrainingLoop
from loraplex.training.service.losses import choose_loss
from loraplex.training.service.operations import BeginRun, FailedCall, ForwardBackward, Operation, OptimStep, Result
from loraplex.training.service.settings import AdamParams, RunSettings, ServiceLimits

ROOT = Path(__file__).parents[1]
DOMAINS = ("quantum", "materials", "protein", "peptides")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class KeptResults:
    """Results as they are, and requests that are never read again."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def parse(self, kind: str, body: bytes, run_id: str) -> Operation:
        raise NotImplementedError("a benchmark's requests are not replayed")

    def encode(self, result: Result) -> bytes:
        if isinstance(result, FailedCall):
            self.failures.append(result.message)
        return b"."


def records(model: MultiLoraModel, domain: str) -> list[Datum]:
    """A domain's conversations, of which the answers count."""
    job = AdapterJob(
        name=domain,
        data=ROOT / "data" / domain / "train.jsonl",
        lora=LoraConfig(target_modules=TARGETS),
        steps=StepsConfig(max_steps=1),
        evaluation=EvaluationConfig(eval_fraction=0),
    )
    data = load_job_data(job, model.tokenizer, model.base.get_input_embeddings().num_embeddings)
    found = []
    for example in data.train:
        counts = torch.zeros(len(example.inputs))
        counts[[index - 1 for index in example.answer]] = 1.0
        found.append(Datum(tokens=example.inputs, targets=torch.tensor(example.ids[1:]), inputs={"weights": counts}))
    return found


class LoopClient:
    """One run and its loop."""

    def __init__(self, loop: TrainingLoop, number: int, data: list[Datum], batch: int, rank: int) -> None:
        self.loop, self.data, self.batch, self.seq = loop, data, batch, 0
        self.id = f"s-{number:016x}:train:0"
        settings = RunSettings(
            run_id=self.id,
            owner="benchmark",
            base_model="base",
            rank=rank,
            seed=number,
            train_attn=True,
            train_mlp=True,
            train_unembed=False,
            target_modules=TARGETS,
        )
        loop.begin(settings, JournalRecord(0, "x", b""), BeginRun())

    def step(self) -> int:
        """One step; returns its tokens."""
        first = self.seq // 2 * self.batch % (len(self.data) - self.batch)
        data = self.data[first : first + self.batch]
        loss = choose_loss("cross_entropy", {})
        operations = (ForwardBackward(datums=data, loss=loss, backward=True), OptimStep(AdamParams()))
        for operation in operations:
            self.seq += 1
            self.loop.submit(self.id, JournalRecord(self.seq, "x", b""), lambda own=operation: own)
        for seq in (self.seq - 1, self.seq):
            future = self.loop.result(self.id, seq)
            assert future is not None, "a request that was sent is known"
            future.result()
        return sum(len(datum.tokens) for datum in data)


def measure(options: argparse.Namespace, num_clients: int) -> dict[str, float]:
    """Medians of tokens/s, one client after the other and all at once."""
    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    now, codec = CLOCKS[options.clock], KeptResults()
    with tempfile.TemporaryDirectory() as folder:
        loop = TrainingLoop(
            model.base,
            model.adaptable,
            root=Path(folder),
            checkpoints=Checkpoints(Path(folder)),
            codec=codec,
            publish=lambda operation, adapter: None,
            limits=ServiceLimits(snapshot_steps=10**6),
        )
        data = [records(model, DOMAINS[number % len(DOMAINS)]) for number in range(num_clients)]
        clients = [LoopClient(loop, n, data[n], options.batch, options.rank) for n in range(num_clients)]

        def after_another() -> float:
            start = now()
            tokens = sum(client.step() for client in clients)
            return tokens / (now() - start)

        def at_once() -> float:
            start, told = now(), [0] * num_clients

            def work(number: int) -> None:
                told[number] = clients[number].step()

            threads = [threading.Thread(target=work, args=(number,)) for number in range(num_clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return sum(told) / (now() - start)

        after_another()  # to warm up
        figures = alternate({"after_another": after_another, "at_once": at_once}, options.rounds)
        loop.close()
    assert not codec.failures, codec.failures[:3]
    return medians(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--batch", type=int, default=2, help="records of each step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: list[dict[str, Any]] = []
    for num_clients in options.clients:
        console.print(f"{num_clients} clients ...")
        results.append({"clients": num_clients, "tokens_per_s": measure(options, num_clients)})
    rows = []
    for result in results:
        speeds = result["tokens_per_s"]
        ratio = speeds["at_once"] / speeds["after_another"]
        rows.append([str(result["clients"]), *(f"{speed:.0f}" for speed in speeds.values()), f"{ratio:.2f}"])
    print_table(
        f"{options.model}: clients of the training service, {options.batch} records a step; tokens/s",
        ["clients", "one after the other", "at once", "ratio"],
        rows,
    )
    if not options.no_save:
        save("training_service", vars(options), results)


if __name__ == "__main__":
    main()
