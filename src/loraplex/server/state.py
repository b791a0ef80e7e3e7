"""What all requests of a server share, and what one request carries."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastapi import Request as HttpRequest

from loraplex.engine.adapter_folder import AdapterFolder
from loraplex.engine.async_engine import AsyncEngine
from loraplex.server.access import Catalog, Principal
from loraplex.server.keys import KeyFile
from loraplex.server.metrics import Metrics
from loraplex.server.rates import KeyUsage, Usages
from loraplex.server.roots import AdapterRoots
from loraplex.server.settings import ServeConfig
from loraplex.server.token_texts import TokenTexts

SCOPE_KEY = "loraplex"


class ServerState:
    """The engine, the settings, and who is doing what."""

    def __init__(self, engine: AsyncEngine, config: ServeConfig, watched: AdapterFolder | None = None) -> None:
        self.engine = engine
        self.watched = watched
        self.config = config
        self.model = engine.model
        self.catalog = Catalog(engine.model, config.model.base_name, config.limits.max_link_length)
        self.keys = KeyFile(config.access.keys_file) if config.access.keys_file else None
        self.roots = AdapterRoots(config.access.adapter_roots)
        self.usages = Usages()
        self.metrics = Metrics(engine, watched)
        self.started = int(time.time())
        self.num_active = 0  # requests that were accepted and not answered
        self.is_draining = False

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.model.tokenizer)


@dataclass
class RequestContext:
    """One HTTP request: its id, its principal, and what its log line will tell."""

    id: str
    principal: Principal = field(default_factory=Principal)
    usage: KeyUsage | None = None
    log: dict[str, Any] = field(default_factory=dict)

    def spend_tokens(self, count: int) -> None:
        if self.usage is not None:
            self.usage.spend_tokens(count)


def state_of(http: HttpRequest) -> ServerState:
    state: ServerState = http.app.state.server
    return state


def context_of(http: HttpRequest) -> RequestContext:
    context: RequestContext = http.scope[SCOPE_KEY]
    return context
