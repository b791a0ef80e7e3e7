"""The gates that routers predict, kept for the rows that want to know them."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.errors import RequestError
from loraplex.routing.segments import RoutedGate, Segment
from loraplex.routing.weight_provider import WeightProvider


class RecordedRun(NamedTuple):
    """The tokens of one row's mixture in a plan, and its columns in the record."""

    record: Hashable
    first: int  # column of the first token's first expert
    num_tokens: int
    num_experts: int


class GateRecord:
    """The gates of one plan's wanted experts, written by whichever kernel runs a module; 0 until then.

    A module's row holds, for each run of tokens, [tokens, experts]. They come without the weight of the row's link.
    """

    def __init__(self, runs: Mapping[int, Sequence[RecordedRun]], values: Tensor) -> None:
        """`runs` by their first token; `values` [modules, columns]  float32."""
        self._runs = {(run.record, start): run for start, found in runs.items() for run in found}
        self.values = values

    def column(self, gate: RoutedGate, start: int) -> tuple[int, int]:
        """Of an expert's segment that begins at `start`: its first token's column, and the columns between tokens.

        (-1, 1) where nobody wants to know it.
        """
        run = self._runs.get((gate.record, start))
        return (-1, 1) if run is None else (run.first + gate.expert, run.num_experts)

    def put(self, module: int, gate: RoutedGate, start: int, gates: Tensor) -> None:  # [tokens]
        """Keep an expert's gates, if they are wanted."""
        first, stride = self.column(gate, start)
        if first >= 0:
            self.values[module, first::stride][: len(gates)] = gates.detach()

    def take(self) -> list[tuple[Hashable, Tensor]]:
        """What was written since the last time: of each run [tokens, modules, experts]; everything is 0 again."""
        found = []
        for run in self._runs.values():
            own = self.values[:, run.first : run.first + run.num_tokens * run.num_experts]
            by_token = own.unflatten(1, (run.num_tokens, run.num_experts)).transpose(0, 1)
            found.append((run.record, by_token.clone()))
        self.values.zero_()
        return found


def make_gate_record(segments: Sequence[Segment], bank: WeightProvider) -> GateRecord | None:
    """For a plan of these segments; None where no row wants to know its gates."""
    members: dict[tuple[Hashable, int, int], int] = {}  # how many experts
    for segment in segments:
        if isinstance(segment.gate, RoutedGate) and segment.gate.record is not None:
            key = (segment.gate.record, segment.start, segment.stop)
            members[key] = members.get(key, 0) + 1
    table = bank.native_table()
    if not members or table is None:
        return None
    runs: dict[int, list[RecordedRun]] = {}
    num_columns = 0
    for (record, start, stop), num_experts in members.items():
        runs.setdefault(start, []).append(RecordedRun(record, num_columns, stop - start, num_experts))
        num_columns += (stop - start) * num_experts
    return GateRecord(runs, torch.zeros(table[0].shape[1], num_columns, device=table[0].device))


class GateLog:
    """The gates of a call's rows over its passes, by their positions in the rows.

    One sequence a row: what a row's copies (beams) have is refused when it is asked for.
    """

    def __init__(self) -> None:
        self._passes: dict[Hashable, dict[int, Tensor]] = {}  # by record and pass, [tokens, modules, experts]
        self._starts: list[int] = [0]  # of each pass, its first token's position; there is one before the first
        self._num_new = 0
        self._has_copies = False

    def begin_pass(self, num_new: int, length: int | None) -> None:
        """Learn how many columns the pass that begins adds to the rows, and how many they then have."""
        self._starts.append(self._starts[-1] + self._num_new if length is None else length - num_new)
        self._num_new = num_new

    def add(self, found: Sequence[tuple[Hashable, Tensor]], copies: int) -> None:
        """Keep what modules of one layout wrote in the pass that runs, [copies * tokens, modules, experts] each."""
        for record, gates in found:
            self._has_copies |= copies > 1
            own = gates[-self._num_new :]  # some layers see what is in the cache too
            passes = self._passes.setdefault(record, {})
            total = passes.setdefault(len(self._starts) - 1, gates.new_zeros(self._num_new, *gates.shape[1:]))
            total[self._num_new - len(own) :] += own  # a layer that sees fewer tokens sees the last ones

    def gates(self, record: Hashable, num_experts: int) -> Tensor:  # [tokens, modules, experts]
        """Those of all tokens that ran; where a later pass ran them again, its. Raises RequestError for copies."""
        if self._has_copies:
            raise RequestError(
                "return_scalings tells each row's scalings, but here a row has several sequences (num_beams or "
                "num_return_sequences above 1). Pass each sequence as a row of its own."
            )
        passes = self._passes.get(record, {})
        if not passes:
            return torch.zeros(0, 0, num_experts)
        length = max(self._starts[number] + len(values) for number, values in passes.items())
        total = torch.zeros(length, *next(iter(passes.values())).shape[1:])
        for number, values in sorted(passes.items()):
            total[self._starts[number] : self._starts[number] + len(values)] = values.cpu()
        return total
