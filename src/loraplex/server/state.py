"""What all requests of a server share, and what one request carries."""

import logging
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastapi import Request as HttpRequest

from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.frontend.structured_output import make_constraint
from loraplex.errors import BaseModelError, ConfigError, RequestError
from loraplex.models.adapter_watcher import AdapterWatcher
from loraplex.server.api.api_errors import ApiError
from loraplex.server.api.chat_prompts import ChatEncoder
from loraplex.server.api.token_texts import TokenTexts
from loraplex.server.auth.access import Principal, VisibleModels
from loraplex.server.auth.keys import KeyFile
from loraplex.server.auth.path_sandbox import AdapterRoots
from loraplex.server.auth.rate_limit import Attempts, Cost, KeyUsage, Usages
from loraplex.server.metrics import Metrics
from loraplex.server.settings import ServeConfig
from loraplex.server.workers import Workers

logger = logging.getLogger(__name__)

SCOPE_KEY = "loraplex"
NUM_CHECKERS = 2  # threads that check keys
_NUM_WORKERS = 4  # threads that read requests and write answers
_NUM_LOADERS = 4  # threads that load adapters, which takes longer


class ServerState:
    """The engine, the settings, and who is doing what."""

    def __init__(self, engine: AsyncEngine, config: ServeConfig, watched: AdapterWatcher | None = None) -> None:
        self.engine = engine
        self.watched = watched
        self.config = config
        self.model = engine.model
        self.catalog = VisibleModels(engine.model, config.model.base_name, config.limits.max_link_length)
        self.keys = KeyFile(config.access.keys_file) if config.access.keys_file else None
        self.roots = AdapterRoots(config.access.adapter_roots)
        self.usages = Usages()
        self.attempts = Attempts(config.access.max_wrong_keys_per_minute)
        self.checkers = Workers(NUM_CHECKERS, "loraplex-keys")
        self.metrics = Metrics(engine, watched)
        self.workers = Workers(_NUM_WORKERS, "loraplex-work")
        self.loaders = Workers(_NUM_LOADERS, "loraplex-load")
        self.started = int(time.time())
        self.num_active = 0  # requests that were accepted and not answered
        self.is_draining = False

    def prepare(self) -> None:
        """Make ahead what would hold up all requests when the first one needs it."""
        try:
            tokenizer = self.model.tokenizer
        except BaseModelError:  # token ids alone
            return
        self.chats.prepare()
        try:
            make_constraint({"type": "object"}, tokenizer, self.engine.vocab_size)
        except ConfigError as error:  # llguidance is not installed, which a request is told
            logger.info("%s", error)
        except RequestError as error:
            logger.warning("response_format can't be used with this model: %s", error)

    @cached_property
    def chats(self) -> ChatEncoder:
        allowed = self.config.access.allow_special_tokens_in_content
        return ChatEncoder(self.model.tokenizer, allow_special_tokens=allowed)

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.model.tokenizer)


@dataclass
class RequestContext:
    """One HTTP request: its id, its principal, and what its log line will tell."""

    id: str
    address: str = ""  # the client's
    principal: Principal = field(default_factory=Principal)
    usage: KeyUsage | None = None
    cost: Cost = Cost.READING
    log: dict[str, Any] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """Whose share of the threads its work takes."""
        return self.address if self.principal.key is None else self.principal.id

    def note(self, error: ApiError) -> None:
        """Let the request's log line tell a refusal; not what it quotes of the request."""
        self.log |= {"code": error.status.code, "error": error.log_message}
        if error.param is not None:
            self.log["param"] = error.param

    def spend_tokens(self, count: int) -> None:
        if self.usage is not None:
            self.usage.spend_tokens(count)


def state_of(http: HttpRequest) -> ServerState:
    state: ServerState = http.app.state.server
    return state


def context_of(http: HttpRequest) -> RequestContext:
    context: RequestContext = http.scope[SCOPE_KEY]
    return context
