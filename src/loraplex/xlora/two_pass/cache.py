"""Keys and values of both passes: the main sequences' and, beside them, the scaling sequences'."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from loraplex.errors import RequestError

_GROWTH = 128  # columns that are added at least when a buffer is full
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, kw_only=True)
class Window:
    """What one forward pass sees of the buffers: some rows, and their columns [start, end) before it."""

    rows: slice | Tensor
    start: int
    end: int


class PairedLayer(CacheLayerMixin):
    """One attention layer's keys and values, in buffers [main + scaling sequences, heads, columns, head_dim].

    Buffers are allocated ahead, so that a step writes one column and copies nothing. A sliding window is left to the
    attention mask.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: "PairedCache") -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (self._buffer(states, 0) for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the window and return its keys and values with theirs."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None, "an initialized layer has buffers"
        assert self.values is not None, "an initialized layer has buffers"
        window = self._cache.window
        stop = window.end + key_states.shape[-2]
        if stop > self.keys.shape[-2]:
            self.keys, self.values = self._grown(self.keys, stop), self._grown(self.values, stop)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[window.rows, :, window.end : stop] = states
        columns = slice(window.start, stop)
        return self.keys[window.rows, :, columns], self.values[window.rows, :, columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.window.end - self._cache.window.start

    def get_max_length(self) -> int:
        return -1

    def take_rows(self, rows: Tensor) -> None:
        """Let the buffers hold these of their rows, in this order."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def _buffer(self, states: Tensor, columns: int) -> Tensor:
        _, heads, _, head_dim = states.shape
        return states.new_zeros(self._cache.num_rows, heads, columns, head_dim)

    def _grown(self, buffer: Tensor, columns: int) -> Tensor:
        held = buffer.shape[-2]
        larger = self._buffer(buffer, max(columns + _GROWTH, held + held // 2))
        larger[:, :, :held] = buffer
        return larger


class PairedCache(Cache):
    """Two caches in one set of buffers, so that a main pass and a scaling pass can also run as rows of one batch.

    Rows are the main sequences and then the scaling sequences. A main sequence's tokens lie one column to the right of
    its scaling sequence's: when the scaling pass is one token ahead (a drafted one), both end in the same column.
    To `generate` it is the cache of the main sequences.
    """

    def __init__(self, config: PreTrainedConfig, scaling_rows: tuple[int, ...]) -> None:
        text_config = config.get_text_config(decoder=True)
        kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
        if not kinds <= _ATTENTION_LAYERS:
            raise RequestError(
                f"mixtures keep keys and values of two passes, but this model has layers of the kind "
                f"{sorted(kinds - _ATTENTION_LAYERS)}, whose state is something else. Pass use_cache=False."
            )
        self._layers = [PairedLayer(self) for _ in range(text_config.num_hidden_layers)]
        super().__init__(layers=list(self._layers))
        self.scaling_rows = scaling_rows  # the batch row of each scaling row
        self.copies = 1  # sequences of each row (beams)
        self.num_main = 0  # sequences; known when the first pass begins
        self.main_length = 0  # tokens
        self.scaling_length = 0
        self.followers: list[Any] = []  # what else is kept for each main sequence; told of every reordering and crop
        self.carried: dict[str, Tensor] = {}  # by scaling sequence: what the next pass needs besides keys and values
        self.window = Window(rows=slice(0, 0), start=1, end=1)

    @property
    def num_rows(self) -> int:
        return self.num_main + len(self.scaling_rows) * self.copies

    def begin(self, num_main: int, copies: int) -> None:
        """Learn the batch's size before the first pass."""
        self.num_main, self.copies = num_main, copies
        self.show_main()

    def show_main(self) -> None:
        """Let the next pass be the main one, and let `generate` see its cache."""
        self.window = Window(rows=slice(0, self.num_main), start=1, end=self.main_length + 1)

    def show_scaling(self, sequences: Tensor | None = None, *, back: int = 0) -> None:
        """Let the next pass be the scaling one, of some scaling sequences or all, `back` tokens before their end."""
        rows = slice(self.num_main, self.num_rows) if sequences is None else sequences + self.num_main
        self.window = Window(rows=rows, start=0, end=self.scaling_length - back)

    def show_both(self) -> None:
        """Let the next pass run all sequences, the scaling ones a token ahead; column 0 of the main ones is empty."""
        assert self.scaling_length == self.main_length + 1, "the scaling pass is not one token ahead"
        self.window = Window(rows=slice(0, self.num_rows), start=0, end=self.scaling_length)

    def drop_draft(self) -> None:
        """Forget a scaling pass that is ahead of the main one: the next step isn't drafted."""
        if self.scaling_length > self.main_length:
            self.scaling_length = self.main_length
            self.carried = {}

    def scaling_sequences(self, device: torch.device) -> Tensor:  # [scaling sequences]
        """The main sequence that each scaling sequence belongs to."""
        rows = torch.tensor(self.scaling_rows, device=device)
        return (rows.unsqueeze(1) * self.copies + torch.arange(self.copies, device=device)).flatten()

    def rows_of(self, main_sequences: Tensor) -> Tensor:  # [main sequences] -> [rows]
        """The buffers' rows when every main sequence takes over another of its batch row (beam search)."""
        own = self.scaling_sequences(main_sequences.device)
        taken = main_sequences[own]  # within the same batch row: its first scaling sequence lies at the same distance
        scaling = torch.arange(len(own), device=own.device) + taken - own
        return torch.cat([main_sequences, scaling + self.num_main])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        rows = self.rows_of(beam_idx)
        scaling = rows[self.num_main :] - self.num_main
        self.carried = {name: tensor[scaling] for name, tensor in self.carried.items()}
        for layer in self._layers:
            layer.take_rows(rows)
        for follower in self.followers:
            follower.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of all sequences; given as a negative number, as transformers does."""
        if tokens_to_remove == 0:
            return
        ahead = self.scaling_length - self.main_length
        self.main_length -= abs(tokens_to_remove)
        self.scaling_length = self.main_length + min(ahead, 0)
        self.carried = {}
        for follower in self.followers:
            follower.crop(tokens_to_remove)
        self.show_main()

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise RequestError(
            "a batch with mixtures can't be widened after its first pass. Use greedy search, sampling or beam search."
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        raise RequestError(
            "rows can't leave a batch with mixtures after its first pass. Use greedy search, sampling or beam search."
        )
