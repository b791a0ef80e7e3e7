"""From settings to a server that runs, and from SIGTERM to its end."""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from loraplex.engine.async_engine import AsyncEngine
from loraplex.extras import require_extra
from loraplex.models.adapter_watcher import AdapterWatcher
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.server.app import create_app
from loraplex.server.auth.path_sandbox import found_path
from loraplex.server.connections import protocol_with
from loraplex.server.listening import check_address, url_of
from loraplex.server.logs import set_up_logs
from loraplex.server.settings import ServeConfig
from loraplex.server.state import ServerState
from loraplex.server.tracing import tracing_from_environment
from loraplex.threads import computing_alone, workers_given_back

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_LAST_WORDS_S = 2.0  # for errors of what was cut off to reach their clients


class Server(uvicorn.Server):
    """Ends in order: new requests get 503, accepted ones finish, or are told so after `drain_s`."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, on_ready: "Callable[[Server], None] | None" = None
    ) -> None:
        super().__init__(config)
        self.state = state
        self.port = config.port  # once it listens, the real one
        self._on_ready = on_ready
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            self.port = self.servers[0].sockets[0].getsockname()[1]
            told = {
                "host": self.config.host,
                "port": self.port,
                "url": url_of(self.state.config.network, self.port),
                "model": self.state.config.model.base_name,
                "adapters": self.state.loaded_names(),
            }
            logger.info("ready", extra=told)
            if self._on_ready is not None:
                self._on_ready(self)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, a second one doesn't wait for it."""
        if self.state.is_draining or not self.started:
            self.should_exit = self.force_exit = True
            return
        self.drain()

    def drain(self) -> None:
        """Begin to shut down; from any thread."""
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        self.state.is_draining = True
        drain_s = self.state.config.network.drain_s
        logger.info("shutting down", extra={"requests": self.state.num_active, "drain_s": drain_s})
        await self._until_idle(drain_s)
        if self.state.num_active:
            logger.warning("requests were cut off", extra={"requests": self.state.num_active})
            await self.state.engine.close()  # ends them as cancelled, which their clients are told
            await self._until_idle(_LAST_WORDS_S)
        self.should_exit = True

    async def _until_idle(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.state.num_active:
                    await asyncio.sleep(_POLL_S)


def load_model(config: ServeConfig) -> MultiLoraModel:
    """The base model with everything that the settings name."""
    wanted = config.model
    model = MultiLoraModel.from_pretrained(
        wanted.model, dtype=wanted.dtype, device=wanted.device, store=config.store, weights=wanted.weights
    )
    for name, path in wanted.adapters.items():
        folder = found_path(path, config.access.adapter_roots)
        model.load_adapter(name, folder)
        logger.info("loaded", extra={"adapter": name, "folder": str(folder)})
    for name, path in wanted.mixtures.items():
        folder = found_path(path, config.access.adapter_roots)
        model.load_mixture(name, folder)
        logger.info("loaded", extra={"adapter": name, "folder": str(folder)})
    return model


async def serve(
    model: MultiLoraModel, config: ServeConfig, *, on_ready: Callable[[Server], None] | None = None
) -> None:
    """Serve until a signal, or until `drain` of the server that `on_ready` gets."""
    watched = AdapterWatcher(model, config.model.watch) if config.model.watch else None
    if watched is not None:
        await asyncio.to_thread(watched.start)
    async with AsyncEngine(model, config.engine) as engine:
        state = ServerState(engine, config, watched)
        state.tracing = tracing_from_environment()
        if state.keys is not None:
            state.keys.records()  # a file that can't be read is an error now, not at the first request
        await asyncio.to_thread(state.prepare)
        if config.training.training:
            await asyncio.to_thread(_begin_training, state)
        try:
            await Server(uvicorn_config(create_app(state), config), state, on_ready).serve()
        finally:
            if watched is not None:
                await asyncio.to_thread(watched.stop)
            if state.tracing is not None:
                await asyncio.to_thread(state.tracing.close)
            if state.training is not None:
                await asyncio.to_thread(state.training.close)


@workers_given_back()
def _begin_training(state: ServerState) -> None:
    """Raises MissingExtraError, and BaseModelError for a base model that can't be trained on."""
    require_extra("tinker", "--training")
    from loraplex.server.tinker.service import TinkerService  # which needs the extra

    state.training = TinkerService(state.engine, state.config.training, state.config.model.base_name)
    state.training.samplers.on_unload = state.metrics.forget
    state.catalog.checkpoints = state.training
    logger.info("training", extra={"folder": state.config.training.training_folder})


def run(config: ServeConfig, *, on_ready: Callable[[Server], None] | None = None) -> None:
    """`loraplex serve`."""
    set_up_logs(config.logs.log_level)
    check_address(config.network)
    with ThreadPoolExecutor(1) as loader:  # its workers end with it (threads.py)
        model = loader.submit(load_model, config).result()
    run_server(model, config, on_ready=on_ready)


def run_server(model: MultiLoraModel, config: ServeConfig, *, on_ready: Callable[[Server], None] | None = None) -> None:
    """`serve` on an event loop of its own, of uvloop's where that is installed."""
    with computing_alone(), asyncio.Runner(loop_factory=event_loops()) as runner:
        runner.run(serve(model, config, on_ready=on_ready))


def event_loops() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes event loops: uvloop's, where that is installed. Without its log_config uvicorn leaves logs alone."""
    return uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()


def uvicorn_config(app: ASGIApp, config: ServeConfig) -> uvicorn.Config:
    """Uvicorn's own settings, from ours."""
    network = config.network
    return uvicorn.Config(
        app,
        http=protocol_with(network, config.limits.stall_timeout_s),
        ws="none",
        proxy_headers=False,  # anyone could name another address to be counted under
        host=network.host,
        port=network.port,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=max(1, round(network.keep_alive_s)),
        timeout_graceful_shutdown=1,  # requests have ended by then
        limit_concurrency=2 * network.max_connections,
        ssl_certfile=network.tls_certificate or None,
        ssl_keyfile=network.tls_key or None,
        ssl_ca_certs=network.tls_client_ca or None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if network.tls_client_ca else ssl.CERT_NONE,
    )
