"""A real server on 127.0.0.1 with a tiny random model, in a thread of this process or in one of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

from loraplex import EngineConfig, MultiLoraModel, XLoraConfig
from loraplex.server.auth.keys import KeyFile
from loraplex.server.lifecycle import Server, run_server
from loraplex.server.settings import (
    AccessSettings,
    LogSettings,
    ModelSettings,
    NetworkSettings,
    RequestLimits,
    ServeConfig,
)
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model
from tests.training.tiny_jobs import tiny_tokenizer

TIMEOUT_S = 120
ENGINE = EngineConfig(cache_bytes=2**22, max_waiting=64, max_running=8)
MIXTURE = XLoraConfig(layerwise_scalings=True, xlora_depth=1, xlora_size=16)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, whose texts join without spaces."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = Fuse()
    return tokenizer


def write_adapters(root: Path) -> Path:
    """Folders a, b and c below a root."""
    for seed, name in enumerate("abc", 1):
        random_peft_adapter(tiny_model("llama"), root / name, targets=linear_targets("llama"), seed=seed)
    return root


def make_model(root: Path) -> MultiLoraModel:
    """Adapters a and b, a mixture of both, and one of a alone with c."""
    model = MultiLoraModel(tiny_model("llama"))
    model.__dict__["tokenizer"] = character_tokenizer()
    for name in "abc":
        model.load_adapter(name, root / name)
    model.create_mixture("mix-ab", ["a", "b"], MIXTURE)
    model.create_mixture("mix-ac", ["a", "c"], MIXTURE, seed=1)
    return model


@dataclass
class Running:
    """A server that takes requests."""

    server: Server
    model: MultiLoraModel
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT_S)

    def async_client(self, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT_S)

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S)


def settings(
    *,
    keys: KeyFile | None = None,
    roots: tuple[str, ...] = (),
    limits: RequestLimits | None = None,
    drain_s: float = 10,
) -> ServeConfig:
    return ServeConfig(
        model=ModelSettings(served_name="tiny"),
        network=NetworkSettings(port=0, drain_s=drain_s),
        access=AccessSettings(keys_file="" if keys is None else str(keys.path), adapter_roots=roots),
        limits=limits or RequestLimits(),
        logs=LogSettings(log_requests=True),
        engine=ENGINE,
    )


@contextmanager
def running(model: MultiLoraModel, config: ServeConfig) -> Iterator[Running]:
    """A server in a thread; it must end when it is told to."""
    ready, found = threading.Event(), []

    def on_ready(server: Server) -> None:
        found.append(server)
        ready.set()

    def run() -> None:
        try:
            run_server(model, config, on_ready=on_ready)
        finally:
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(TIMEOUT_S), "the server didn't start in time"
    assert found, "the server ended before it was ready"
    try:
        yield Running(found[0], model, thread)
    finally:
        found[0].drain()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "the server didn't end"


def wait_until_idle(server: Running) -> None:
    """Until nothing runs, waits or is held."""
    import time

    stop = time.monotonic() + TIMEOUT_S
    while time.monotonic() < stop:
        stats = server.server.state.engine.stats()
        held = (stats.num_running, stats.num_waiting, stats.num_blocks_held, stats.num_passes)
        if held == (0, 0, 0, 0) and server.server.state.num_active == 0:
            return
        time.sleep(0.02)
    raise AssertionError(f"still held: {held}, {server.server.state.num_active} HTTP requests")
