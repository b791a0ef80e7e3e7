"""Does the engine survive a life of requests that are cancelled or wrong, and adapters that change and go?"""

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.store.store import StoreConfig
from loraplex.bench.churn_adapters import CHANGING, MIXTURE, NUM_VERSIONS, STABLE, ChurnAdapters, DrawnSpec, draw_spec
from loraplex.bench.churn_reference import Answered, Reference
from loraplex.bench.churn_report import ChurnReport, Holdings
from loraplex.bench.random_adapters import TINY, load_model
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Delta, Request, RequestResult
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import AdapterNotFoundError, ConfigError, LoraplexError
from loraplex.validation import check_least

_ANSWER_TOKENS = (1, 3, 8, 12)
_IN_FLIGHT = 48  # requests at most
_PREFIX_LENGTHS = (0, 16, 33)  # what prompts begin with, of which there are few
_TAIL_LENGTHS = (1, 2, 9, 17, 40)
_NUM_SLOTS = 10  # fewer than the versions that are asked for at times
_NUM_BLOCKS = 100  # of keys and values: some requests must give way to others
_SETTLED = 0.2  # of the requests, from where on memory may not grow; not before so many have finished:
_MIN_SETTLED = 200
_DISTURBANCES = ("cancel", "bad", "replace", "unload", "clear")
_WEIGHTS = (8, 4, 4, 2, 1)


@dataclass(frozen=True, kw_only=True)
class ChurnBench:
    """Requests with random adapters, links and a mixture. Beside them, at random: cancels, requests that can't be
    served, replacements and unloads of adapters, and an emptied prefix cache.
    """

    model: str = TINY
    dtype: str = "float32"  # so that every token can be compared
    requests: int = 1000
    prompts: int = 24
    disturbances: float = 0.6  # a step
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, dict.fromkeys(("requests", "prompts"), 1))
        if not 0 <= self.disturbances <= 1:
            raise ConfigError(f"disturbances is {self.disturbances}; it must be from 0 to 1.")


def run_churn(bench: ChurnBench, tell: Callable[[str], None] = lambda _: None) -> ChurnReport:
    """Run all requests, compare every answer with `generate`, and see what is left behind."""
    store = StoreConfig(num_slots=_NUM_SLOTS)
    model = load_model(bench.model, bench.dtype, store)
    with tempfile.TemporaryDirectory() as folder:
        adapters = ChurnAdapters(model, bench.model, Path(folder))
        before = Holdings.of(model)
        with Engine(model) as probe:
            block_bytes = probe.config.cache_bytes // probe.stats().num_blocks
        config = EngineConfig(
            cache_bytes=_NUM_BLOCKS * block_bytes, max_length=150, max_running=12, max_step_tokens=64, fair_tokens=16
        )
        with Engine(model, config) as engine:
            churn = Churn(bench, engine, adapters)
            churn.run(tell)
            churn.report.problems += before.problems_after(Holdings.of(model), engine.stats())
        tell(f"comparing {len(churn.answers)} different answers ...")
        reference = Reference(model, churn.prompts, max(_ANSWER_TOKENS))
        churn.report.ties, wrong = reference.check(churn.answers)
    churn.report.problems += wrong
    return churn.report


@dataclass
class _Sent:
    """A request in the engine."""

    prompt: int
    choice: DrawnSpec
    num_tokens: int
    added: int  # the moment
    begun: int | None = None  # the moment of its first token


class Churn:
    """The traffic, step by step; the same seed gives the same."""

    def __init__(self, bench: ChurnBench, engine: Engine, adapters: ChurnAdapters) -> None:
        self._bench = bench
        self._engine = engine
        self._adapters = adapters
        self._draw = random.Random(bench.seed)
        self._vocab_size = engine.model.base.get_input_embeddings().num_embeddings
        self.prompts = [self._make_prompt(random.Random(number)) for number in range(bench.prompts)]
        self._running: dict[str, _Sent] = {}
        self._moment = 0
        self.answers: set[Answered] = set()
        self.report = ChurnReport()

    def run(self, tell: Callable[[str], None]) -> None:
        start, num_left, told = time.perf_counter(), self._bench.requests, 0
        settled = max(_SETTLED * self._bench.requests, _MIN_SETTLED)
        while num_left or self._engine.has_work:
            self._moment += 1
            while num_left and len(self._running) < _IN_FLIGHT and self._draw.random() < 0.7:
                num_left -= self._add()
            if num_left and self._draw.random() < self._bench.disturbances:
                self._moment += 1
                self._disturb()
            self._moment += 1
            for delta in self._engine.step():
                self._take(delta)
            if self.report.memory_began is None and self.report.finished >= settled:
                self.report.start_memory()
            if self.report.finished >= told + 500:
                told = self.report.finished
                tell(f"{told} of {self._bench.requests} requests ...")
        self.report.end_memory()
        self.report.seconds = time.perf_counter() - start

    def _make_prompt(self, draw: random.Random) -> tuple[int, ...]:
        length = draw.choice(_PREFIX_LENGTHS)
        prefix = random.Random(length).choices(range(7, self._vocab_size), k=length)
        return (*prefix, *draw.choices(range(7, self._vocab_size), k=draw.choice(_TAIL_LENGTHS)))

    def _add(self) -> bool:
        """Send a request; False if its adapter isn't there now, which must be refused."""
        choice, prompt = draw_spec(self._draw), self._draw.randrange(len(self.prompts))
        num_tokens, n = self._draw.choice(_ANSWER_TOKENS), self._draw.choice((1, 1, 1, 2))
        sampling = SamplingParams(max_tokens=num_tokens, n=n, ignore_eos=True)
        priority = self._draw.choice((0, 0, 0, 1))
        request = Request(self.prompts[prompt], adapters=choice.row(), sampling=sampling, priority=priority)
        if choice.changing is not None and not self._adapters.is_loaded(choice.changing):
            self._expect_refusal(lambda: self._engine.add_request(request), "a request for an unloaded adapter")
            return False
        self._running[self._engine.add_request(request)] = _Sent(prompt, choice, num_tokens, self._moment)
        return True

    # Disturbances

    def _disturb(self) -> None:
        kind = self._draw.choices(_DISTURBANCES, _WEIGHTS)[0]
        name = self._draw.choice(CHANGING)
        if kind == "cancel":
            self._engine.cancel(self._draw.choice([*self._running, "unknown"]))
        elif kind == "bad":
            what, call = self._draw.choice(list(self._bad_calls().items()))
            self._expect_refusal(call, what)
        elif kind == "replace":
            self._adapters.load(name, self._draw.randrange(NUM_VERSIONS), self._moment)
            self.report.replaced += 1
        elif kind == "unload" and self._adapters.is_loaded(name):
            self._adapters.unload(name, self._moment)
            self.report.unloaded += 1
        elif kind == "clear":
            self._engine.clear_prefix_cache()

    def _bad_calls(self) -> dict[str, Callable[[], object]]:
        add, model, known = self._engine.add_request, self._engine.model, self._adapters.folder_of(STABLE[0])
        beyond = self._vocab_size
        return {
            "an empty prompt": lambda: add(Request([])),
            "an unknown token": lambda: add(Request([beyond])),
            "a prompt that is too long": lambda: add(Request([3] * 200)),
            "an unknown adapter": lambda: add(Request([3], adapters="unknown")),
            "a malformed link": lambda: add(Request([3], adapters=f"{STABLE[0]}:x")),
            "an adapter twice": lambda: add(Request([3], adapters=f"{STABLE[0]}+{STABLE[0]}")),
            "an unknown stop token": lambda: add(Request([3], sampling=SamplingParams(stop_token_ids=(beyond,)))),
            "no tokens": lambda: add(Request([3], sampling=SamplingParams(max_tokens=0))),
            "a negative temperature": lambda: add(Request([3], sampling=SamplingParams(temperature=-1.0))),
            "unloading an expert": lambda: model.unload(STABLE[0]),
            "a name in use": lambda: model.load_adapter(STABLE[0], known),
            "a mixture's name": lambda: model.load_adapter(MIXTURE, known),
            "a folder that is not there": lambda: model.load_adapter("new", known / "nowhere"),
        }

    def _expect_refusal(self, call: Callable[[], object], what: str) -> None:
        try:
            call()
        except LoraplexError:
            self.report.refused += 1
        else:
            self.report.problems.append(f"{what} was not refused")

    # Answers

    def _take(self, delta: Delta) -> None:
        self.report.tokens += len(delta.token_ids)
        sent = self._running.get(delta.request_id)
        if sent is None:  # its answers ended in one step, and an earlier one's delta took the result
            return
        if delta.token_ids and sent.begun is None:
            sent.begun = self._moment
        if delta.finish_reason is None:
            return
        result = self._engine.pop_result(delta.request_id)
        if result is not None:
            del self._running[delta.request_id]
            self.report.finished += 1
            self._judge(sent, result)

    def _judge(self, sent: _Sent, result: RequestResult) -> None:
        """Keep what can be compared later; all else must have a reason."""
        begun = self._moment if sent.begun is None else sent.begun
        versions = self._adapters.versions_between(sent.choice.changing, sent.added, begun)
        reasons = {completion.finish_reason for completion in result.completions}
        self.report.cancelled += "cancelled" in reasons
        for completion in result.completions:
            if completion.finish_reason == "error":
                was_away = sent.choice.changing is not None and None in versions
                if isinstance(completion.error, AdapterNotFoundError) and was_away:
                    self.report.without_adapter += 1
                else:
                    self.report.problems.append(f"{sent} ended with {completion.error!r}")
            elif completion.finish_reason == "length" and len(completion.token_ids) != sent.num_tokens:
                self.report.problems.append(f"{sent} got {len(completion.token_ids)} tokens")
            elif completion.finish_reason not in ("length", "cancelled"):
                self.report.problems.append(f"{sent} ended with {completion.finish_reason!r}")
            elif completion.token_ids:
                self.answers.add(Answered(sent.prompt, sent.choice, versions, completion.token_ids))
                self.report.checked += 1
