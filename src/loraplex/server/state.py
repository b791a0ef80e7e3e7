"""What all requests of a server share, and what one request carries."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from fastapi import Request as HttpRequest
from starlette.types import Receive
from transformers import PreTrainedTokenizerBase

from loraplex.adapters.vocabulary import Vocabulary
from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.frontend.structured_output import make_constraint
from loraplex.errors import BaseModelError, ConfigError, LoraplexError, RequestError
from loraplex.models.adapter_watcher import AdapterWatcher
from loraplex.models.text.sampling_defaults import sampling_defaults
from loraplex.routing.adapter_spec import AdapterSpec, is_auto, parse_adapter_spec
from loraplex.server.api.api_errors import ApiError, as_api_error
from loraplex.server.api.chat_prompts import ChatEncoder
from loraplex.server.api.responses.recent_items import RecentItems
from loraplex.server.api.tools.templates import ToolTemplate
from loraplex.server.auth.access import Principal, VisibleModels
from loraplex.server.auth.keys import KeyFile
from loraplex.server.auth.path_sandbox import AdapterRoots
from loraplex.server.auth.rate_limit import Attempts, Cost, KeyUsage, Usages
from loraplex.server.metrics import Metrics
from loraplex.server.settings import ServeConfig
from loraplex.server.tracing import Tracing
from loraplex.threads import stand_beside, workers_given_back

if TYPE_CHECKING:  # its messages need the extra "tinker"
    from loraplex.server.tinker.service import TinkerService

logger = logging.getLogger(__name__)

SCOPE_KEY = "loraplex"
NUM_CHECKERS = 2  # threads that check keys
_NUM_WORKERS = 4  # threads that read requests and write answers
_NUM_LOADERS = 4  # threads that load adapters, which takes longer
_MAX_NAMES_TOLD = 100
T = TypeVar("T")


class ServerState:
    """The engine, the settings, and who is doing what."""

    def __init__(self, engine: AsyncEngine, config: ServeConfig, watched: AdapterWatcher | None = None) -> None:
        self.engine = engine
        self.watched = watched
        self.config = config
        self.model = engine.model
        self.sampling_defaults = sampling_defaults(engine.model.base, config.model.generation_config)
        self.catalog = VisibleModels(engine.model, config.model.base_name, config.limits.max_link_length)
        self.keys = KeyFile(config.access.keys_file) if config.access.keys_file else None
        self.roots = AdapterRoots(config.access.adapter_roots)
        self.usages = Usages()
        self.attempts = Attempts(config.access.max_wrong_keys_per_minute)
        self.checkers = Workers(NUM_CHECKERS, "loraplex-keys")
        self.metrics = Metrics(engine, watched)
        self.workers = Workers(_NUM_WORKERS, "loraplex-work")
        self.loaders = Workers(_NUM_LOADERS, "loraplex-load")
        self.recent_items = RecentItems()  # of /v1/responses
        self.started = int(time.time())
        self.num_active = 0  # requests that were accepted and not answered
        self.is_draining = False
        self.tracing: Tracing | None = None
        self.training: TinkerService | None = None
        self._row_tokenizers: WeakKeyDictionary[Vocabulary, RowTokenizer] = WeakKeyDictionary()

    @workers_given_back()
    def prepare(self) -> None:
        """Make ahead what would hold up all requests when the first one needs it."""
        try:
            tokenizer = self.model.tokenizer
        except BaseModelError:  # token ids alone
            return
        self.base_row_tokenizer.chats.prepare()
        try:
            make_constraint({"type": "object"}, tokenizer, self.engine.vocab_size)
        except ConfigError as error:  # llguidance is not installed, which a request is told
            logger.info("%s", error)
        except RequestError as error:
            logger.warning("response_format can't be used with this model: %s", error)

    def loaded_names(self) -> list[str]:
        """Of adapters, mixtures and residuals, as far as a line of the log can tell them."""
        names = self.model.names()
        rest = len(names) - _MAX_NAMES_TOLD
        return names if rest <= 0 else [*names[:_MAX_NAMES_TOLD], f"and {rest} more"]

    @cached_property
    def base_row_tokenizer(self) -> "RowTokenizer":
        """The base model's."""
        return self._row_tokenizer_with(lambda: self.model.tokenizer)

    def row_tokenizer(self, adapters: AdapterSpec) -> "RowTokenizer":
        """That of a row: an adapter's which brings tokens of its own, else the base model's.

        Raises AdapterNotFoundError, or RequestError for a link of adapters with different tokens.
        """
        vocabulary = None if is_auto(adapters) else self.model.registry.vocabulary(parse_adapter_spec(adapters))
        tokenizer = None if vocabulary is None else vocabulary.tokenizer
        if vocabulary is None or tokenizer is None:
            return self.base_row_tokenizer
        known = self._row_tokenizers.get(vocabulary)
        if known is None:
            known = self._row_tokenizers.setdefault(vocabulary, self._row_tokenizer_with(lambda: tokenizer))
        return known

    def _row_tokenizer_with(self, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> "RowTokenizer":
        return RowTokenizer(
            tokenizer,
            allow_special_tokens=self.config.access.allow_special_tokens_in_content,
            tool_call_parser=self.config.model.tool_call_parser,
        )


class RowTokenizer:
    """How the text of some rows becomes tokens and back: a tokenizer and what is made of it, when it is asked for."""

    def __init__(
        self, tokenizer: Callable[[], PreTrainedTokenizerBase], *, allow_special_tokens: bool, tool_call_parser: str
    ) -> None:
        self._tokenizer = tokenizer
        self._allow_special_tokens = allow_special_tokens
        self._tool_call_parser = tool_call_parser

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer()

    @cached_property
    def chats(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer, allow_special_tokens=self._allow_special_tokens)

    @cached_property
    def tools(self) -> ToolTemplate:
        return ToolTemplate(self.tokenizer, self._tool_call_parser)

    @cached_property
    def texts(self) -> "TokenTexts":
        return TokenTexts(self.tokenizer)


@dataclass
class RequestContext:
    """One HTTP request: its id, its principal, and what its log line will tell."""

    id: str
    address: str = ""  # the client's
    principal: Principal = field(default_factory=Principal)
    usage: KeyUsage | None = None
    cost: Cost = Cost.READING
    path: str = ""
    span: Any = None  # of a trace
    response: dict[str, Any] = field(default_factory=dict)  # id and model of the answer
    log: dict[str, Any] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """Whose share of the threads its work takes."""
        return self.address if self.principal.key is None else self.principal.id

    def refusal(self, error: LoraplexError) -> ApiError:
        """An engine's error as this client may read it."""
        return as_api_error(error, may_see_all=self.principal.may_manage)

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


class TokenTexts:
    """Texts by token id, decoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def of(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = str(self._tokenizer.decode([token], skip_special_tokens=False))
        return text

    def of_all(self, tokens: tuple[int, ...] | list[int]) -> list[str]:
        return [self.of(token) for token in tokens]


class Workers:
    """A pool of threads, of which one owner (a key, or without keys an address) has at most half at a time.

    Work whose caller was cancelled before it began is never begun. Used on one event loop.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name, initializer=stand_beside)
        self._share = max(1, num_threads // 2)
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, owner: str, work: Callable[[], T]) -> T:
        """The work's result; an owner's place is free again when the work has ended, not when its caller has left."""
        turn = self._turns.get(owner)
        if turn is None:
            turn = self._turns[owner] = asyncio.Semaphore(self._share)
        await turn.acquire()
        loop = asyncio.get_running_loop()
        future = self._pool.submit(work)
        future.add_done_callback(lambda done: _release(turn, loop))
        return await asyncio.wrap_future(future)  # cancelling it cancels what hasn't begun


def _release(turn: asyncio.Semaphore, loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and all turns with it
        loop.call_soon_threadsafe(turn.release)


class ClientLeft(Exception):
    """The client closed its connection before it had its answer."""


async def until_client_leaves(receive: Receive, work: Coroutine[object, object, T]) -> T:
    """The work's result; if the client leaves first, the work is cancelled and ClientLeft raised."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def in_thread(http: HttpRequest, work: Callable[[], T], pool: Workers | None = None) -> T:
    """Do it in one of the server's threads; what hasn't begun when the client leaves is never begun.

    Raises ClientLeft.
    """
    threads = pool or state_of(http).workers
    return await until_client_leaves(http.receive, threads.run(context_of(http).owner, work))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
