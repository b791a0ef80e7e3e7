"""Messages of the Tinker API: what a few bytes may ask for is bounded before it is unpacked."""

import numpy as np
import pytest

from loraplex.errors import RequestError
from loraplex.server.tinker.codec import TinkerCodec
from loraplex.server.tinker.wire import CLASSES, LossRequest
from loraplex.training.service.datums import DatumLimits
from loraplex.training.service.operations import ForwardBackward, RefusedCall

LIMITS = DatumLimits(max_length=64, max_tokens=100, num_embeddings=128, num_logits=128)


def sparse_body(rows: int, tokens: int, width: int = 2, copies: int = 1) -> bytes:
    """A request whose targets are sparse: one value in each row."""
    message = CLASSES["ForwardBackwardRequest"](model_id="s-1:train:0", seq_id=1, loss_fn="cross_entropy")
    for _ in range(copies):
        own = message.data.add()
        own.model_input.add().encoded_text.tokens = np.arange(3, 3 + tokens, dtype=np.int32).tobytes()
        for name, kind, dtype in (("target_tokens", np.int64, 2), ("weights", np.float32, 1)):
            tensor = own.loss_fn_inputs.add(key=name).value
            tensor.dtype = dtype
            tensor.shape.extend([rows, width])
            tensor.sparse_csr.values = np.ones(rows, dtype=kind).tobytes()
            tensor.sparse_csr.crow_indices = np.arange(rows + 1, dtype=np.int64).tobytes()
            tensor.sparse_csr.col_indices = (np.arange(rows) % width).astype(np.int64).tobytes()
    return bytes(message.SerializeToString())


def test_sparse_targets_have_zeros_where_nothing_is_listed() -> None:
    operation = TinkerCodec(LIMITS).parse("loss", sparse_body(4, 4), "s-1:train:0")
    assert isinstance(operation, ForwardBackward), operation
    (datum,) = operation.datums
    assert datum.targets.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert datum.inputs["weights"].tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]


def test_sparse_tensors_of_more_rows_than_tokens_are_refused_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "zeros", None)  # nothing of their size is made
    with pytest.raises(RequestError, match="4 tokens"):
        LossRequest(sparse_body(100_000, 4, width=64)).datums()


def test_requests_of_too_many_tokens_are_refused_before_their_data_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossRequest, "datums", None)
    found = TinkerCodec(LIMITS).parse("loss", sparse_body(30, 30, copies=4), "s-1:train:0")
    assert isinstance(found, RefusedCall)
    assert "120 tokens; 100 are possible" in str(found.error)
    found = TinkerCodec(LIMITS).parse("loss", sparse_body(0, 0, copies=101), "s-1:train:0")
    assert isinstance(found, RefusedCall)
    assert "101 tokens" in str(found.error)
