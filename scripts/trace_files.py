"""Which files one piece of work goes through, in the order of their first call: what docs/architecture.md counts.

    python -m scripts.trace_files [chat | mixture | training ...]

chat      one chat request for a link of two adapters, from the socket to the last token and back
mixture   a decode step of the engine with one mixture row
training  one step of two adapters, in the second epoch and not the first of it

A tiny random model of Llama's architecture does the work, with SmolLM2's tokenizer.
"""

import argparse
import http.client
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

import loraplex
from loraplex import Engine, LoraConfig, MultiLoraModel, Request, SamplingParams, XLoraConfig
from loraplex.bench.random_adapters import random_adapter
from loraplex.models.checkpoints.loading import load_tokenizer, resolve_base_model
from loraplex.models.checkpoints.smollm2 import ALIAS
from loraplex.server.lifecycle import Server, run_server
from loraplex.server.settings import ModelSettings, NetworkSettings, ServeConfig
from loraplex.training import AdapterJob, StepsConfig, TrainConfig, train_adapters
from loraplex.training.core.trainer import Trainer

ROOT = Path(loraplex.__file__).parent
LINK = "protein:0.7+materials:0.3"
Files = dict[str, list[str]]  # the functions that were called in each, both in order


class Recorder:
    """Notes loraplex's own functions that are called in any thread while it is on."""

    def __init__(self) -> None:
        self.files: Files = {}
        self._is_on = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if not self._is_on or event != "call":
            return
        code = frame.f_code
        if code.co_filename.startswith(str(ROOT)) and not code.co_name.startswith("<"):
            functions = self.files.setdefault(str(Path(code.co_filename).relative_to(ROOT)), [])
            if code.co_qualname not in functions:
                functions.append(code.co_qualname)

    @contextmanager
    def on(self) -> Iterator[None]:
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False


def tiny_model(names: tuple[str, ...] = ()) -> MultiLoraModel:
    """A random Llama for SmolLM2's tokens, with random adapters of these names."""
    source = resolve_base_model(ALIAS)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=load_tokenizer(source).vocab_size, num_key_value_heads=2, **sizes)
    model = MultiLoraModel(LlamaForCausalLM(config).eval(), source=source)
    for seed, name in enumerate(names):
        model.store.add(name, random_adapter(model.adaptable.shapes, 4, model.dtype, seed), None)
    return model


def chat(recorder: Recorder) -> None:
    model = tiny_model(("protein", "materials"))
    ready, servers = threading.Event(), []

    def on_ready(server: Server) -> None:
        servers.append(server)
        ready.set()

    config = ServeConfig(model=ModelSettings(served_name="tiny"), network=NetworkSettings(port=0))
    thread = threading.Thread(target=run_server, args=(model, config), kwargs={"on_ready": on_ready})
    thread.start()
    ready.wait()
    body = {"model": LINK, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": True}
    try:
        _post(servers[0].port, body)  # what is done once only is done before
        with recorder.on():
            _post(servers[0].port, body)
    finally:
        servers[0].drain()
        thread.join()


def _post(port: int, body: dict[str, Any]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    if answer.status != 200 or "[DONE]" not in text:
        raise RuntimeError(f"the server answered {answer.status}: {text}")


def mixture(recorder: Recorder) -> None:
    model = tiny_model(("a", "b"))
    model.create_mixture("mixture", ["a", "b"], XLoraConfig(layerwise_scalings=True))
    with Engine(model) as engine:
        engine.add_request(Request([5, 6, 7], adapters="mixture", sampling=SamplingParams(max_tokens=16)))
        for _ in range(6):
            engine.step()
        with recorder.on():
            engine.step()


def training(recorder: Recorder) -> None:
    step, count = Trainer.step, 0

    def recorded(self: Trainer, *arguments: Any) -> None:
        nonlocal count
        count += 1
        with recorder.on() if count == 6 else _nothing():  # of 4 to an epoch
            step(self, *arguments)

    model = tiny_model()
    Trainer.step = recorded  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        line = json.dumps({"prompt": "What is silk?", "completion": " A protein."}) + "\n"
        data.write_text(8 * line)
        jobs = [
            AdapterJob(
                name=name,
                data=data,
                lora=LoraConfig(r=2, target_modules=("q_proj",)),
                steps=StepsConfig(max_steps=6, batch_size=2),
            )
            for name in ("a", "b")
        ]
        train_adapters(model, model.tokenizer, jobs=jobs, config=TrainConfig(output=Path(folder) / "out"))
    Trainer.step = step  # type: ignore[method-assign]


@contextmanager
def _nothing() -> Iterator[None]:
    yield


WORK: dict[str, Callable[[Recorder], None]] = {"chat": chat, "mixture": mixture, "training": training}


def trace(name: str) -> Files:
    """The files of one piece of work."""
    recorder = Recorder()
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    try:
        WORK[name](recorder)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return recorder.files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", metavar="|".join(WORK), help="default: all")
    parser.add_argument("--functions", action="store_true", help="the functions of each file too")
    options = parser.parse_args()
    for name in options.work or WORK:
        files = trace(name)
        print(f"{name}: {len(files)} files, {sum(map(len, files.values()))} functions")
        for number, (file, functions) in enumerate(files.items(), 1):
            print(f"  {number:3} {file}" + (f": {', '.join(functions)}" if options.functions else ""))


if __name__ == "__main__":
    main()
