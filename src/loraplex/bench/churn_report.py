"""What happened in a churn, and what it left behind."""

import gc
from dataclasses import asdict, dataclass, field
from typing import Any

from loraplex.adapters.store.version import AdapterVersion
from loraplex.bench.measures import resident_bytes
from loraplex.engine.stats import EngineStats
from loraplex.models.multi_lora import MultiLoraModel

MAX_GROWTH_BYTES = 32 * 2**20  # of the process, from the time when all that is kept was allocated


@dataclass(kw_only=True)
class ChurnReport:
    """Counts; of a sound engine `problems` is empty."""

    finished: int = 0
    checked: int = 0  # answers that were compared, those of cancelled requests up to where they ended
    ties: int = 0  # different answers that left the reference where the best two logits are equal up to rounding
    cancelled: int = 0
    refused: int = 0  # bad requests and calls
    replaced: int = 0
    unloaded: int = 0
    without_adapter: int = 0  # answers that waited while their adapter was unloaded
    tokens: int = 0
    seconds: float = 0.0
    memory_began: int | None = None  # resident bytes
    memory_ended: int | None = None
    problems: list[str] = field(default_factory=list)

    def start_memory(self) -> None:
        gc.collect()
        self.memory_began = resident_bytes()

    def end_memory(self) -> None:
        gc.collect()
        self.memory_ended = resident_bytes()
        if self.memory_began is not None and self.memory_ended is not None:
            grown = self.memory_ended - self.memory_began
            if grown > MAX_GROWTH_BYTES:
                self.problems.append(f"memory grew by {grown / 2**20:.0f} MiB")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What a model and the process hold of adapters."""

    num_adapters: int
    num_versions: int  # objects of the process, forgotten ones too if somebody keeps them
    num_leases: int

    @classmethod
    def of(cls, model: MultiLoraModel) -> "Holdings":
        gc.unfreeze()  # an engine's heap is frozen, and what is frozen isn't told
        gc.collect()
        states = model.adapters()
        return cls(
            num_adapters=len(states),
            num_versions=sum(type(found) is AdapterVersion for found in gc.get_objects()),
            num_leases=sum(state.num_leases for state in states),
        )

    def problems_after(self, after: "Holdings", stats: EngineStats) -> list[str]:
        """What is still held when all requests have ended."""
        held = {
            "leases": after.num_leases - self.num_leases,
            "forgotten versions": (after.num_versions - self.num_versions) - (after.num_adapters - self.num_adapters),
            "blocks": stats.num_blocks_held,
            "tracks": stats.num_passes,
            "running answers": stats.num_running,
            "waiting requests": stats.num_waiting,
        }
        return [f"{count} {what} are still held" for what, count in held.items() if count]
