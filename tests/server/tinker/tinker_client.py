"""What the Tinker SDK sends and reads, over plain HTTP. The SDK itself runs in tests/clients/tinker."""

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import httpx
import numpy as np

from loraplex.server.tinker.wire import CLASSES, MEDIA

TIMEOUT_S = 120
FLOAT32, INT64 = 1, 2


def loss_body(
    model_id: str, seq: int, data: Sequence[Mapping[str, Any]], loss: str = "cross_entropy", **options: Any
) -> bytes:
    """A ForwardBackwardRequest; each datum has `tokens`, and arrays by name."""
    message = CLASSES["ForwardBackwardRequest"](model_id=model_id, seq_id=seq, loss_fn=loss)
    message.forward_only = options.pop("forward_only", False)
    for name, value in options.items():
        message.loss_fn_config_v2.add(key=name).value.number = value
    for datum in data:
        own = message.data.add()
        own.model_input.add().encoded_text.tokens = np.asarray(datum["tokens"], dtype=np.int32).tobytes()
        for name, values in datum.items():
            if name == "tokens":
                continue
            array = np.asarray(values, dtype=np.int64 if name == "target_tokens" else np.float32)
            tensor = own.loss_fn_inputs.add(key=name).value
            tensor.dense, tensor.dtype = array.tobytes(), INT64 if name == "target_tokens" else FLOAT32
            tensor.shape.extend(array.shape)
    return bytes(message.SerializeToString())


class TinkerClient:
    """One session of one key, with one training run at most."""

    def __init__(self, url: str, key: str = "tml-none") -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers={"x-api-key": key}, timeout=TIMEOUT_S)
        self.session = self.post("create_session", tags=[], user_metadata=None, sdk_version="0")["session_id"]
        self.model_id = ""
        self.seq = 0

    def post(self, call: str, **fields: Any) -> dict[str, Any]:
        response = self.http.post(f"/{call}", json=fields)
        assert response.status_code == 200, response.text
        return response.json()

    def result(self, request_id: str) -> Any:
        """As the SDK asks for it: again and again."""
        stop = time.monotonic() + TIMEOUT_S
        while time.monotonic() < stop:
            response = self.http.post("/retrieve_future", json={"request_id": request_id, "allow_metadata_only": True})
            if response.status_code == 408:
                continue
            assert response.status_code == 200, response.text
            if response.headers["content-type"] == MEDIA:
                return response.content
            return response.json()
        raise AssertionError(f"{request_id} has no result")

    def create(
        self, *, rank: int = 4, seed: int | None = 1, base: str = "tiny", number: int = 0, **targets: bool
    ) -> Any:
        promised = self.post(
            "create_model",
            session_id=self.session,
            model_seq_id=number,
            base_model=base,
            lora_config={"rank": rank, "seed": seed, **targets},
            optimizer_config={"type": "adamw"},
            type="create_model",
        )
        answer = self.result(promised["request_id"])
        self.model_id = answer.get("model_id", "")
        return answer

    def losses(self, data: Sequence[Mapping[str, Any]], loss: str = "cross_entropy", **options: Any) -> Any:
        """The sum and each datum's log probabilities, or the failure."""
        self.seq += 1
        body = loss_body(self.model_id, self.seq, data, loss, **options)
        response = self.http.post("/forward_backward", content=body, headers={"content-type": MEDIA})
        assert response.status_code == 200, response.text
        found = self.result(response.json()["request_id"])
        if isinstance(found, dict):
            return found
        output = CLASSES["ForwardBackwardOutput"].FromString(found)
        logprobs = []
        for record in output.loss_fn_outputs:
            (field,) = record.fields
            offsets = np.frombuffer(field.value.offsets, dtype=np.int64)
            for first, stop in pairwise(offsets):
                own = np.frombuffer(field.value.data[first:stop], dtype=np.float32)
                logprobs.append(own.reshape(-1, *field.value.trailing_shape))
        return {metric.key: metric.value for metric in output.metrics}["loss:sum"], logprobs

    def call(self, call: str, **fields: Any) -> Any:
        """A request of the run in its order; its result."""
        self.seq += 1
        return self.result(self.post(call, model_id=self.model_id, seq_id=self.seq, **fields)["request_id"])

    def step(self, **adam: float) -> Any:
        return self.call("optim_step", adam_params={"learning_rate": 2e-3, "eps": 1e-8, **adam}, type="optim_step")

    def sample(
        self, prompt: Sequence[int], *, seq: int | None = None, count: int = 1, sampling: Any = None, **fields: Any
    ) -> Any:
        chunk = {"type": "encoded_text", "tokens": list(prompt)}
        promised = self.post(
            "asample",
            prompt={"chunks": [chunk]},
            sampling_params={"max_tokens": 5, "temperature": 0.0, **(sampling or {})},
            num_samples=count,
            seq_id=seq,
            **fields,
        )
        assert len(promised["sample_sequence_ids"]) == count
        found = self.result(promised["request_id"])
        return found if isinstance(found, dict) else CLASSES["SampleResponse"].FromString(found)
