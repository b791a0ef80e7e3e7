"""What the packed integers of GPTQ and AWQ checkpoints stand for.

Both keep for a linear module, whose weight is [out, in], whole numbers q and for each group of inputs a zero z and a
scale s of every output:

    weight[o, i] = s[g(i), o] * (q[i, o] - z[g(i), o])

GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel write it: q packed along the inputs, z along the outputs, the first in
a word's lowest bits; g(i) is `g_idx[i]`. In the first format of the two, "gptq", a zero is written as one less: all of
a word's together, as GPTQModel converts it, so that a number that has no room goes over into its neighbour.
AWQ (arXiv 2306.00978) as AutoAWQ writes it ("gemm"): q and z packed along the outputs, whose order in a word is
0 2 4 6 1 3 5 7; g(i) is i // group_size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.errors import BaseModelError

_WORD = 32  # bits
_GPTQ_BITS = (2, 4, 8)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each place in a word
PARTS = ("qweight", "qzeros", "scales", "g_idx")  # of a module


@dataclass(frozen=True, kw_only=True)
class PackedFormat:
    """How one checkpoint's weights are packed."""

    method: str  # "gptq" or "awq"
    bits: int
    group_size: int  # inputs; -1: all
    zeros_are_less_one: bool = False

    @property
    def per_word(self) -> int:
        return _WORD // self.bits

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:  # out, in
        """Of the weight, by its parts' shapes. Raises ValueError for parts that don't belong together."""
        rows, columns = shapes["qweight"]
        num_in, num_out = (rows * self.per_word, columns) if self.method == "gptq" else (rows, columns * self.per_word)
        groups = -(-num_in // self.group_size) if self.group_size > 0 else 1
        expected: dict[str, tuple[int, ...]] = {
            "qzeros": (groups, num_out // self.per_word),
            "scales": (groups, num_out),
        }
        if "g_idx" in shapes:
            expected["g_idx"] = (num_in,)
        wrong = {name: shapes.get(name) for name, shape in expected.items() if shapes.get(name) != shape}
        if wrong or num_out % self.per_word:
            raise ValueError(f"{wrong or shapes} for {num_in} inputs, {num_out} outputs, {self.bits} bits")
        return num_out, num_in

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:  # [out, in]  float32
        """The weight: exact, as a product of 11 and 9 bits fits. Raises ValueError for a group that isn't there."""
        scales = parts["scales"].float()  # [groups, out]
        if self.method == "gptq":
            q = self._along_rows(parts["qweight"])
            zeros = self._along_columns(self._zeros(parts["qzeros"]), range(self.per_word))
        else:
            q, zeros = (self._along_columns(parts[name], _AWQ_ORDER) for name in ("qweight", "qzeros"))
        groups = self._groups(parts.get("g_idx"), len(q))
        if int(groups.min()) < 0 or int(groups.max()) >= len(scales):
            raise ValueError(f"g_idx names group {int(groups.max())} of {len(scales)}")
        return ((q - zeros[groups]).float() * scales[groups]).t().contiguous()

    def _groups(self, g_idx: Tensor | None, num_in: int) -> Tensor:  # [in]
        if g_idx is not None:
            return g_idx.long()
        return torch.arange(num_in) // (self.group_size if self.group_size > 0 else num_in)

    def _zeros(self, words: Tensor) -> Tensor:
        """Of "gptq", one more in each place."""
        if not self.zeros_are_less_one:
            return words
        one = sum(1 << shift for shift in range(0, _WORD, self.bits))
        return words + torch.tensor(one, dtype=torch.int64).to(torch.int32)

    def _along_rows(self, words: Tensor) -> Tensor:  # [rows, columns] -> [rows * per_word, columns]  int16
        return self._unpacked(words).transpose(1, 2).flatten(0, 1)

    def _along_columns(self, words: Tensor, order: Any) -> Tensor:  # [rows, columns] -> [rows, columns * per_word]
        """`order` names the place that each value of a word has among its own."""
        values = self._unpacked(words)
        placed = torch.empty_like(values)
        placed[:, :, list(order)] = values
        return placed.flatten(1, 2)

    def _unpacked(self, words: Tensor) -> Tensor:  # [rows, columns, per_word]  int16
        shifts = torch.arange(0, _WORD, self.bits, dtype=torch.int32)
        return ((words.unsqueeze(-1) >> shifts) & ((1 << self.bits) - 1)).to(torch.int16)


def packed_format(settings: Mapping[str, Any]) -> PackedFormat:
    """Of a checkpoint's quantization_config. Raises BaseModelError for one that isn't known here."""
    method = str(settings.get("quant_method"))
    bits, group_size = settings.get("bits"), settings.get("group_size", 128)
    kind = str(settings.get("checkpoint_format") or settings.get("format") or settings.get("version") or "").lower()
    known = {"gptq": ("", "gptq", "gptq_v2"), "awq": ("", "gemm")}[method]
    allowed = _GPTQ_BITS if method == "gptq" else (4,)
    if kind not in known:
        raise _unknown(method, f"its format is {kind!r}, of which {', '.join(filter(None, known))} is read")
    if not isinstance(bits, int) or bits not in allowed:
        raise _unknown(method, f"bits is {bits!r}, of which {allowed} are read")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size == 0 or group_size < -1:
        raise _unknown(method, f"group_size is {group_size!r}")
    if settings.get("dynamic"):
        raise _unknown(method, "its modules have settings of their own (dynamic)")
    if method == "awq" and settings.get("zero_point") is False:
        raise _unknown(method, "zero_point is False")
    return PackedFormat(
        method=method, bits=bits, group_size=group_size, zeros_are_less_one=method == "gptq" and kind != "gptq_v2"
    )


def _unknown(method: str, what: str) -> BaseModelError:
    return BaseModelError(
        f"the checkpoint is quantized with {method!r} in a way that isn't read here: {what}. Use another checkpoint of "
        "the model, or one without quantization and quantization_config=BitsAndBytesConfig(load_in_4bit=True)."
    )
