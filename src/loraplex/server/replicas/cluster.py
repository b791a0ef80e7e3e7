"""Start Ray, deploy the replicas, and serve in front of them until a signal."""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from loraplex.errors import ConfigError
from loraplex.extras import require_extra
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.server.app import with_cors
from loraplex.server.lifecycle import Server, event_loops, load_model, uvicorn_config
from loraplex.server.listening import check_address
from loraplex.server.logs import set_up_logs
from loraplex.server.middleware import Gate
from loraplex.server.replicas.loopback import check_loopback, choose_loopback, is_one_machine
from loraplex.server.settings import ServeConfig
from loraplex.server.state import ServerState

logger = logging.getLogger(__name__)

_STATS_PERIOD_S = 1.0  # how often replicas tell which adapters they hold
_HEALTH_PERIOD_S = 2.0  # a dead replica is started again after this
NAME = "loraplex"


def run_replicas(
    config: ServeConfig,
    num_replicas: int,
    *,
    load: Callable[[ServeConfig], MultiLoraModel] = load_model,
    on_ready: Callable[[Server], None] | None = None,
) -> None:
    """`loraplex serve --replicas N`. Joins the cluster at RAY_ADDRESS, or starts Ray on this machine alone."""
    if num_replicas < 1:
        raise ConfigError(f"replicas is {num_replicas}; it must be at least 1.")
    set_up_logs(config.logs.log_level)
    check_address(config.network)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if is_one_machine():
        choose_loopback()
    require_extra("ray", "--replicas")
    import ray
    from ray import serve

    on_loopback = is_one_machine() and config.network.replica_loopback
    if on_loopback:
        check_loopback()
    _start_ray(num_replicas)
    try:
        serve.start(proxy_location="Disabled", grpc_options=None)
        handle = serve.run(_application(config, num_replicas, load, on_loopback), name=NAME, route_prefix=None)
        with asyncio.Runner(loop_factory=event_loops()) as runner:
            runner.run(_serve_front(handle, config, on_ready))
    finally:
        serve.shutdown()
        ray.shutdown()


def _start_ray(num_replicas: int) -> None:
    import ray

    if not is_one_machine():
        ray.init(address=os.environ["RAY_ADDRESS"])
        return
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, num_replicas + 1),
        include_dashboard=False,
    )


def _application(
    config: ServeConfig, num_replicas: int, load: Callable[[ServeConfig], MultiLoraModel], on_loopback: bool
) -> Any:
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from loraplex.server.replicas.replica import EngineReplica

    threads = max(1, (os.cpu_count() or 1) // num_replicas)
    on_gpu = config.model.device.startswith("cuda")
    deployment = serve.deployment(
        EngineReplica,
        name="engine",
        num_replicas=num_replicas,
        max_ongoing_requests=config.network.max_connections,
        graceful_shutdown_timeout_s=config.network.drain_s,
        health_check_period_s=_HEALTH_PERIOD_S,
        logging_config={"enable_access_log": False},  # the front has a line for each request
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": int(on_gpu),
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        },
        request_router_config=RequestRouterConfig(
            request_router_class="loraplex.server.replicas.router:AdapterRouter",
            request_routing_stats_period_s=_STATS_PERIOD_S,
        ),
    )
    behind = replace(config, network=replace(config.network, cors_origins=()))  # the front has answered for them
    return deployment.bind(behind, load, on_loopback)


async def _serve_front(handle: Any, config: ServeConfig, on_ready: Callable[[Server], None] | None) -> None:
    from loraplex.server.replicas.front import Front, FrontState

    state = cast(ServerState, FrontState(config))  # all that the gate and the lifecycle use of one
    if state.keys is not None:
        state.keys.records()
    app = with_cors(Gate(Front(handle, cast(Any, state)), state), config.network.cors_origins)
    await Server(uvicorn_config(app, config), state, on_ready).serve()
