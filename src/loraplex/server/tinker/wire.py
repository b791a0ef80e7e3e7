"""The messages of the Tinker API that are in protobuf: losses on their way in, log probabilities on their way out.

Field names and numbers are the protocol's; the SDK's package (tinker.proto) has them too.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from torch import Tensor

from loraplex.errors import RequestError
from loraplex.training.service.datums import MAX_TARGETS, Datum
from loraplex.validation import quoted

MEDIA = "application/x-protobuf"
_Array = npt.NDArray[Any]
_FLOAT32, _INT64, _INT32 = 1, 2, 3
_DTYPES: Mapping[int, Any] = {_FLOAT32: np.float32, _INT64: np.int64, _INT32: np.int32}
NO_TOKEN, NO_LOGPROB = 0, -99999.0  # of an empty cell of a top-k matrix

# By message: its fields by number, each "name: type", with "*" where it is repeated, with "?" where it may be missing.
_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "SparseCsr": {1: "values: bytes", 2: "crow_indices: bytes", 3: "col_indices: bytes"},
    "Tensor": {1: "dense: bytes ?", 2: "sparse_csr: SparseCsr", 3: "dtype: int32", 4: "shape: int64 *"},
    "EncodedTextChunk": {1: "tokens: bytes"},
    "Opaque": {},
    "Chunk": {1: "encoded_text: EncodedTextChunk", 2: "image: Opaque", 3: "dmel: Opaque"},
    "Input": {1: "key: string", 2: "value: Tensor"},
    "Datum": {1: "model_input: Chunk *", 2: "loss_fn_inputs: Input *"},
    "LossConfigValue": {1: "number: double ?", 2: "text: string ?"},
    "LossConfig": {1: "key: string", 2: "value: double"},
    "LossConfigV2": {1: "key: string", 2: "value: LossConfigValue"},
    "ForwardBackwardRequest": {
        1: "model_id: string",
        2: "seq_id: int32",
        3: "data: Datum *",
        4: "loss_fn: string",
        5: "loss_fn_config: LossConfig *",
        6: "forward_only: bool",
        7: "loss_fn_config_v2: LossConfigV2 *",
    },
    "BatchedTensor": {1: "data: bytes", 2: "offsets: bytes", 3: "dtype: int32", 4: "trailing_shape: int64 *"},
    "Field": {1: "key: string", 2: "value: BatchedTensor"},
    "ArrayRecord": {1: "type_tag: string", 2: "fields: Field *", 3: "num_datums: int64"},
    "Metric": {1: "key: string", 2: "value: double"},
    "ForwardBackwardOutput": {
        1: "loss_fn_output_type: string",
        2: "loss_fn_outputs: ArrayRecord *",
        3: "metrics: Metric *",
    },
    "TopkLogprobs": {1: "token_ids: bytes", 2: "logprobs: bytes", 3: "k: uint32", 4: "length: uint32"},
    "SampledSequence": {
        1: "stop_reason: int32",
        2: "tokens: bytes",
        3: "logprobs: bytes ?",
        4: "topk_sampled_logprobs: TopkLogprobs",
    },
    "SampleResponse": {
        1: "sequences: SampledSequence *",
        2: "prompt_logprobs: bytes ?",
        3: "topk_prompt_logprobs: TopkLogprobs",
        4: "prompt_cache_hit_tokens: int32",
    },
}
_TYPES = {"double": 1, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "uint32": 13}
_MESSAGE = 11


def _descriptors() -> Mapping[str, Any]:
    """The message classes of the table. An enum is on the wire as an int32 is, and a map as its repeated entries."""
    file = descriptor_pb2.FileDescriptorProto(name="loraplex/tinker.proto", package="loraplex.tinker", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, text in fields.items():
            field_name, kind = text.split(": ")
            kind, _, mark = kind.partition(" ")
            field = message.field.add(name=field_name, number=number, label=3 if mark == "*" else 1)
            field.type = _TYPES.get(kind, _MESSAGE)
            if field.type == _MESSAGE:
                field.type_name = f".loraplex.tinker.{kind}"
            if mark == "?":
                field.proto3_optional = True
                field.oneof_index = len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{field_name}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = message_factory.GetMessageClassesForFiles(["loraplex/tinker.proto"], pool)
    return {name.rpartition(".")[2]: kind for name, kind in found.items()}


CLASSES = _descriptors()


class LossRequest:
    """A forward or forward_backward request. Its address is read at once, its data only when they are asked for."""

    def __init__(self, body: bytes) -> None:
        """Raises RequestError for what is no such message."""
        self._message = CLASSES["ForwardBackwardRequest"]()
        try:
            self._message.ParseFromString(body)
        except DecodeError as error:
            raise RequestError(f"the body is no ForwardBackwardRequest in protobuf: {error}.") from None
        self.model_id = str(self._message.model_id)
        self.seq_id = int(self._message.seq_id)
        self.backward = not self._message.forward_only
        self.loss_fn = str(self._message.loss_fn)

    def config(self) -> dict[str, object]:
        """The loss's options."""
        options: dict[str, object] = {entry.key: entry.value for entry in self._message.loss_fn_config}
        for entry in self._message.loss_fn_config_v2:
            options[entry.key] = entry.value.text if entry.value.HasField("text") else entry.value.number
        return options

    def num_tokens(self) -> int:
        """Of all data, at least one each; nothing is unpacked for it."""
        lengths = [sum(len(chunk.encoded_text.tokens) for chunk in own.model_input) // 4 for own in self._message.data]
        return sum(max(1, length) for length in lengths)

    def datums(self) -> list[Datum]:
        """Raises RequestError."""
        return [_datum(message, f"data[{index}]") for index, message in enumerate(self._message.data)]


def _datum(message: Any, place: str) -> Datum:
    tokens: list[int] = []
    for chunk in message.model_input:
        if not chunk.HasField("encoded_text"):
            raise RequestError(
                f"{place}: model_input has something else than text tokens, which this server can't read."
            )
        tokens += _numbers(chunk.encoded_text.tokens, _INT32, f"{place}: model_input").tolist()
    inputs = {entry.key: _tensor(entry.value, f"{place}: {entry.key}", len(tokens)) for entry in message.loss_fn_inputs}
    targets = inputs.pop("target_tokens", None)
    if targets is None:
        raise RequestError(f"{place}: loss_fn_inputs lacks 'target_tokens'.")
    if targets.is_floating_point():
        raise RequestError(f"{place}: target_tokens are floating-point numbers. Send token ids (int64).")
    return Datum(tokens=tokens, targets=targets.long(), inputs={name: own.float() for name, own in inputs.items()})


def _numbers(content: bytes, dtype: int, what: str) -> _Array:
    kind = _DTYPES.get(dtype)
    if kind is None:
        raise RequestError(f"{what} has the dtype {dtype}; possible: {sorted(_DTYPES)} (float32, int64, int32).")
    if len(content) % np.dtype(kind).itemsize:
        raise RequestError(f"{what} has {len(content)} bytes, no whole number of values.")
    return np.frombuffer(content, dtype=kind)


def _tensor(message: Any, what: str, length: int) -> Tensor:
    """A dense tensor; of a sparse one of `length` rows too, with zeros where nothing is listed."""
    shape = list(message.shape)
    if message.HasField("sparse_csr"):
        if shape[:1] != [length]:  # a few bytes could stand for many rows
            raise RequestError(f"{what} is a sparse tensor of the shape {shape[:8]}; the datum has {length} tokens.")
        return torch.from_numpy(_dense(message.sparse_csr, message.dtype, shape, what))
    values = _numbers(message.dense, message.dtype, what)
    shape = shape or [len(values)]
    if len(shape) > 2 or any(size < 0 for size in shape) or math.prod(shape) != len(values):
        raise RequestError(f"{what} has {len(values)} values for the shape {shape[:8]}.")
    return torch.from_numpy(values.reshape(shape).copy())


def _dense(csr: Any, dtype: int, shape: Sequence[int], what: str) -> _Array:
    values = _numbers(csr.values, dtype, what)
    rows, columns = _numbers(csr.crow_indices, _INT64, what), _numbers(csr.col_indices, _INT64, what)
    is_whole = len(shape) == 2 and 0 <= shape[1] <= MAX_TARGETS and len(rows) == shape[0] + 1
    if not is_whole or len(columns) != len(values) or rows[0] != 0 or rows[-1] != len(values):
        raise RequestError(
            f"{what} is no sparse tensor of the shape {list(shape)[:8]}, with {MAX_TARGETS} columns at most."
        )
    if (np.diff(rows) < 0).any() or (columns < 0).any() or (columns >= shape[1]).any():
        raise RequestError(f"{what} is a sparse tensor whose indices are not in its shape {list(shape)}.")
    dense = np.zeros(shape, dtype=values.dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(rows)), columns] = values
    return dense


def loss_output(logprobs: Sequence[Tensor], metrics: Mapping[str, float]) -> bytes:
    """A ForwardBackwardOutput: each datum's log probabilities; neighbours of one width share a record."""
    output = CLASSES["ForwardBackwardOutput"](loss_fn_output_type="ArrayRecord")
    for name, value in metrics.items():
        output.metrics.add(key=name, value=value)
    first = 0
    while first < len(logprobs):
        width = logprobs[first].shape[1:]
        stop = first
        while stop < len(logprobs) and logprobs[stop].shape[1:] == width:
            stop += 1
        _add_record(output, logprobs[first:stop])
        first = stop
    return bytes(output.SerializeToString())


def _add_record(output: Any, logprobs: Sequence[Tensor]) -> None:
    record = output.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(logprobs))
    value = record.fields.add(key="logprobs").value
    parts = [np.ascontiguousarray(own.numpy(), dtype=np.float32).tobytes() for own in logprobs]
    value.data = b"".join(parts)
    value.offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64).tobytes()
    value.dtype = _FLOAT32
    value.trailing_shape.extend(logprobs[0].shape[1:])


TopTokens = Sequence[Sequence[tuple[int, float]] | None]  # by position, the likeliest tokens; None for one without


def sample_output(
    sequences: Iterable[tuple[bool, Sequence[int], Sequence[float], TopTokens | None]],
    prompt_logprobs: Sequence[float | None] | None,
    prompt_top: TopTokens | None,
    num_cached: int,
) -> bytes:
    """A SampleResponse; of each sequence whether it was cut off, its tokens, their logprobs and the likeliest."""
    output = CLASSES["SampleResponse"](prompt_cache_hit_tokens=num_cached)
    for was_cut, tokens, logprobs, top in sequences:
        own = output.sequences.add(stop_reason=int(was_cut))
        own.tokens = np.asarray(tokens, dtype=np.int32).tobytes()
        own.logprobs = np.asarray(logprobs, dtype=np.float32).tobytes()
        if top is not None:
            _fill_top(own.topk_sampled_logprobs, top)
    if prompt_logprobs is not None:
        values = [math.nan if value is None else value for value in prompt_logprobs]
        output.prompt_logprobs = np.asarray(values, dtype=np.float32).tobytes()
    if prompt_top is not None:
        _fill_top(output.topk_prompt_logprobs, prompt_top)
    return bytes(output.SerializeToString())


def _fill_top(message: Any, top: TopTokens) -> None:
    width = max((len(own) for own in top if own is not None), default=0)
    tokens = np.full((len(top), width), NO_TOKEN, dtype=np.int32)
    logprobs = np.full((len(top), width), NO_LOGPROB, dtype=np.float32)
    for index, own in enumerate(top):
        for rank, (token, logprob) in enumerate(own or ()):
            tokens[index, rank], logprobs[index, rank] = token, logprob
    message.token_ids, message.logprobs = tokens.tobytes(), logprobs.tobytes()
    message.k, message.length = width, len(top)


def model_input_error(kind: str) -> str:
    """What a request is told whose prompt isn't text."""
    return f"a chunk of type {quoted(kind)} is in the prompt; this server reads text tokens (encoded_text) alone."
