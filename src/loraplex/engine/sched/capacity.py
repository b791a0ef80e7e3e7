"""Whether a request fits at all: what it needs at most, against what there is when nothing else runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from loraplex.adapters.store.store import AdapterStore
from loraplex.engine.kv.sequence_kv import LengthRule
from loraplex.errors import RequestError, TooLargeError
from loraplex.validation import listed


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What an engine has: fixed when it is made."""

    max_length: int  # tokens of prompt and answer
    num_blocks: int
    block_tokens: int
    max_answers: int  # of one request
    lengths: LengthRule = field(default_factory=LengthRule)  # when positions change with a sequence's length
    max_passes: int | None = None  # passes that can be under way at once; None: as many as there are blocks for

    def check_answers(self, num_answers: int) -> None:
        """Raises TooLargeError for more answers than may wait and run at once."""
        if num_answers > self.max_answers:
            raise TooLargeError(
                f"n is {num_answers}; the engine takes {self.max_answers} (EngineConfig.max_waiting and max_running "
                "together). Ask for fewer answers a request."
            )

    def check_prompt(self, length: int) -> None:
        """Raises RequestError for a prompt that leaves no room for an answer."""
        if length >= self.max_length:
            raise RequestError(
                f"the prompt has {length} tokens, but prompt and answer together can have {self.max_length}. Shorten "
                "it, or raise EngineConfig.max_length or cache_bytes."
            )

    def check_blocks(self, num_tokens: int, num_passes: int) -> None:
        """Raises TooLargeError if the passes over one answer's tokens need more blocks than there are."""
        if self.max_passes is not None and num_passes > self.max_passes:
            raise TooLargeError(
                f"the request needs the states of {num_passes} passes, but there is room for {self.max_passes}. "
                "Link fewer mixtures, or raise EngineConfig.max_running and cache_bytes."
            )
        needed = -(-num_tokens // self.block_tokens) * num_passes
        if needed > self.num_blocks:
            raise TooLargeError(
                f"the request needs {needed} blocks of keys and values ({num_passes} passes of {num_tokens} tokens), "
                f"but there are {self.num_blocks}. Ask for fewer max_tokens, or raise EngineConfig.cache_bytes."
            )

    def check_mixtures(self, names: Sequence[str], num_tokens: int) -> None:
        """Raises RequestError where keys in a cache are not those of the whole passes that define X-LoRA."""
        threshold = self.lengths.threshold
        if names and threshold is not None and not self.lengths.is_step and num_tokens > threshold:
            raise RequestError(
                f"the mixtures {listed(names)} may reach {num_tokens} tokens, but this model's positions change with "
                f"every token beyond {threshold}, so that X-LoRA can't be computed with a cache. Use "
                f"MultiLoraModel.generate, or at most {threshold} tokens."
            )


def check_slots(store: AdapterStore, names: Sequence[str]) -> None:
    """Raises TooLargeError for adapters that the store's tiers can't hold at once, and AdapterNotFoundError."""
    versions = [store.version(name) for name in dict.fromkeys(names)]
    config = store.config
    if len(versions) > config.num_slots:
        raise TooLargeError(
            f"the request needs {len(versions)} adapters at once ({listed(v.name for v in versions)}), but there are "
            f"{config.num_slots} slots. Link fewer, or raise StoreConfig.num_slots."
        )
    num_bytes = sum(version.num_bytes for version in versions)
    for option, budget in (("slot_bytes", config.slot_bytes), ("host_bytes", config.host_bytes)):
        if budget is not None and num_bytes > budget:
            raise TooLargeError(
                f"the request's adapters ({listed(v.name for v in versions)}) take {num_bytes} bytes at once, but "
                f"StoreConfig.{option} is {budget}. Link fewer, or raise it."
            )


def fits_beside_pinned(store: AdapterStore, names: Sequence[str]) -> bool:
    """Whether the adapters have room in slots once nothing else is in use: what is pinned stays."""
    busy = [state for state in store.states() if state.pinned or state.name in names]
    budget = store.config.slot_bytes
    return len(busy) <= store.config.num_slots and (budget is None or sum(s.num_bytes for s in busy) <= budget)
