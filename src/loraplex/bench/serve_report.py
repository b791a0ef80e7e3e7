"""What a stream of requests over HTTP met, and whether the generator itself kept up."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.bench.measures import percentiles
from loraplex.bench.serve_client import Outcome
from loraplex.errors import RemoteError

_MAX_LAG_S = 0.05  # at p99; beyond, arrivals were no longer those that were asked for
_LONGEST_MESSAGES = 5


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The outcomes of all requests of one stream."""

    outcomes: Sequence[Outcome]
    seconds: float  # from the first due time to the last end

    @property
    def finished(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.is_ok]

    def capacity(self) -> float:
        """Requests/s, if all of them were answered. Raises RemoteError."""
        if len(self.finished) < len(self.outcomes):
            raise RemoteError(
                f"{len(self.outcomes) - len(self.finished)} of {len(self.outcomes)} requests at once failed: "
                f"{self.errors()}, {self.messages()}. Give a rate, or fewer requests at once (flood)."
            )
        return len(self.outcomes) / self.seconds

    def errors(self) -> dict[str, int]:
        """How many requests failed, by HTTP status or by what happened instead of one."""
        return dict(Counter(outcome.status for outcome in self.outcomes if not outcome.is_ok).most_common())

    def messages(self) -> list[str]:
        """Some of what servers told about failures, each once."""
        told = dict.fromkeys(outcome.message for outcome in self.outcomes if outcome.message)
        return list(told)[:_LONGEST_MESSAGES]

    def warnings(self) -> list[str]:
        """Why these figures may not be the server's."""
        found = []
        lag = percentiles([outcome.lag_s for outcome in self.outcomes])["p99"]
        if lag > _MAX_LAG_S:
            found.append(
                f"the generator was late by {lag:.3f} s at p99: it didn't keep up. Give it a machine or core of its "
                "own, or a lower rate."
            )
        num_held = sum(outcome.held_s > _MAX_LAG_S for outcome in self.outcomes)
        if num_held:
            found.append(f"{num_held} requests waited for one of the `concurrency` places; their wait is in the times.")
        if any(not outcome.has_usage for outcome in self.finished):
            found.append("the server told no usage: tokens are pieces of the stream, which may hold several.")
        return found

    def as_json(self) -> dict[str, Any]:
        done = self.finished
        return {
            "seconds": self.seconds,
            "requests": len(self.outcomes),
            "finished": len(done),
            "errors": self.errors(),
            "messages": self.messages(),
            "adapters_asked": len({outcome.adapter for outcome in self.outcomes}),
            "requests_per_s": len(done) / self.seconds,
            "new_tokens_per_s": sum(outcome.num_new_tokens for outcome in done) / self.seconds,
            "prompt_tokens_per_s": sum(outcome.num_prompt_tokens for outcome in done) / self.seconds,
            "prompt_tokens": percentiles([outcome.num_prompt_tokens for outcome in done if outcome.has_usage]),
            "first_token_s": percentiles([o.first_token_s for o in done if o.first_token_s is not None]),
            "token_s": percentiles([o.token_s for o in done if o.token_s is not None]),
            "request_s": percentiles([outcome.end_s for outcome in done]),
            "generator_lag_s": percentiles([outcome.lag_s for outcome in self.outcomes]),
            "held_s": percentiles([outcome.held_s for outcome in self.outcomes]),
            "warnings": self.warnings(),
        }
