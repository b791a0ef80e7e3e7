"""How fast do clients of the training service train at once, and how soon do they sample with new weights?

python benchmarks/training_service.py       # 4 and 8 clients, 2 records each a step; then prompts of 64 tokens

Each client sends its records' losses and an optimizer step, waits for both, and goes on, as a loop of the Tinker SDK
does, but without HTTP. One round is one step of every client; sides alternate. Then one client asks, after each step,
for a token from the weights that it has now: from the step's result to that token, beside the first token of an adapter
that is loaded. `--clock cpu` counts processor time.
"""

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import alternate, console, medians, print_table, save

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.adapters.config import LoraConfig
from loraplex.server.tinker.samplers import SamplerAdapters
from loraplex.training.adapters.config import AdapterJob
from loraplex.training.adapters.data import load_job_data
from loraplex.training.core.config import EvaluationConfig, StepsConfig
from loraplex.training.service.carry_out import Publish
from loraplex.training.service.checkpoints import CheckpointPath, Checkpoints
from loraplex.training.service.datums import Datum
from loraplex.training.service.local_client import LocalClient
from loraplex.training.service.loop import TrainingLoop
from loraplex.training.service.operations import FailedCall, Operation, Result
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
    """One run and its loop: some records a step, one after the other."""

    def __init__(self, loop: TrainingLoop, number: int, data: list[Datum], batch: int, rank: int) -> None:
        self._data, self._batch, self._first = data, batch, 0
        settings = RunSettings(
            run_id=f"s-{number:016x}:train:0",
            owner="benchmark",
            base_model="base",
            rank=rank,
            seed=number,
            train_attn=True,
            train_mlp=True,
            train_unembed=False,
            target_modules=TARGETS,
        )
        self.run = LocalClient(loop, settings, encode=lambda operation: b"")

    def step(self) -> int:
        """One step; returns its tokens."""
        data = self._data[self._first : self._first + self._batch]
        self._first = (self._first + self._batch) % (len(self._data) - self._batch)
        for future in (self.run.losses(data, "cross_entropy"), self.run.step(AdamParams())):
            future.result()
        return sum(len(datum.tokens) for datum in data)


@contextmanager
def training_loop(model: MultiLoraModel, publish: Publish, checkpoints: Checkpoints) -> Iterator[TrainingLoop]:
    """A loop whose requests must all succeed."""
    codec = KeptResults()
    loop = TrainingLoop(
        model.base,
        model.adaptable,
        root=checkpoints.root,
        checkpoints=checkpoints,
        codec=codec,
        publish=publish,
        limits=ServiceLimits(snapshot_steps=10**6),
    )
    try:
        yield loop
    finally:
        loop.close()
    assert not codec.failures, codec.failures[:3]


def measure(options: argparse.Namespace, num_clients: int) -> dict[str, float]:
    """Medians of tokens/s, one client after the other and all at once."""
    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    now = CLOCKS[options.clock]
    with (
        tempfile.TemporaryDirectory() as folder,
        training_loop(model, lambda operation, adapter: None, Checkpoints(Path(folder))) as loop,
    ):
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

        return medians(alternate({"after_another": after_another, "at_once": at_once}, options.rounds))


def first_token(options: argparse.Namespace) -> dict[str, float]:
    """Medians of milliseconds to the first token, of an adapter that is loaded and of the weights of the last step."""
    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    now, draw = CLOCKS[options.clock], random.Random(0)
    engine = Engine(model, EngineConfig())
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        samplers = SamplerAdapters(model, checkpoints)
        with training_loop(model, samplers.publish, checkpoints) as loop:
            client = LoopClient(loop, 0, records(model, DOMAINS[0]), options.batch, options.rank)

            def ask(path: CheckpointPath) -> None:
                """One token after a prompt that no cache has."""
                prompt = [draw.randrange(model.base.config.vocab_size) for _ in range(options.prompt_tokens)]
                sampling = SamplingParams(max_tokens=1, temperature=0.0)
                engine.generate([Request(prompt, adapters=samplers.name_of(path), sampling=sampling)])

            def new_weights() -> float:
                client.step()
                start = now()
                path, published = client.run.publish()
                published.result()
                ask(path)
                seconds = now() - start
                while (
                    checkpoints.find(path) is None
                ):  # the folder follows; it is not to be in the way of the other side
                    time.sleep(0.01)
                return 1000 * seconds

            client.step()
            loaded, published = client.run.publish()
            published.result()

            def of_loaded() -> float:
                start = now()
                ask(loaded)
                return 1000 * (now() - start)

            return medians(alternate({"loaded_ms": of_loaded, "new_weights_ms": new_weights}, options.token_rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", help="of the base model; SmolLM2's own is bfloat16")
    parser.add_argument("--clients", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--batch", type=int, default=2, help="records of each step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the prompts whose first token is waited for")
    parser.add_argument("--token-rounds", type=int, default=15, help="of those prompts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clients = []
    for num_clients in options.clients:
        console.print(f"{num_clients} clients ...")
        clients.append({"clients": num_clients, "tokens_per_s": measure(options, num_clients)})
    console.print("first tokens ...")
    results: dict[str, Any] = {"clients": clients, "first_token": first_token(options)}
    rows = []
    for result in clients:
        speeds = result["tokens_per_s"]
        ratio = speeds["at_once"] / speeds["after_another"]
        rows.append([str(result["clients"]), *(f"{speed:.0f}" for speed in speeds.values()), f"{ratio:.2f}"])
    print_table(
        f"{options.model}: clients of the training service, {options.batch} records a step; tokens/s",
        ["clients", "one after the other", "at once", "ratio"],
        rows,
    )
    times = results["first_token"]
    print_table(
        f"{options.model}: first token after {options.prompt_tokens} tokens; ms",
        ["a loaded adapter", "the last step's weights", "ratio"],
        [[*(f"{value:.1f}" for value in times.values()), f"{times['new_weights_ms'] / times['loaded_ms']:.2f}"]],
    )
    if not options.no_save:
        save("training_service", vars(options), results)


if __name__ == "__main__":
    main()
