"""Traces: a span for each request, and in it one with the gen_ai.* attributes; none of them tells a prompt."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from loraplex.errors import ConfigError
from loraplex.server.tracing import Tracing, tracing_from_environment
from tests.server.tiny_server import Running, make_model, running, settings

SECRET = "spider silk"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def traced(root: Path) -> Iterator[tuple[Running, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with running(make_model(root), settings()) as server:
        server.server.state.tracing = Tracing(provider)
        yield server, exporter


def spans_of(traced, method: str, path: str, **options):
    server, exporter = traced
    exporter.clear()
    answer = server.http().request(method, path, **options)
    answer.read()
    return answer, {span.kind: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_has_both_spans(traced, stream):
    body = {"model": "a+b", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 5, "ignore_eos": True}
    body |= {"temperature": 0.5, "seed": 7, "top_k": 9, "stream": stream}
    headers = {"traceparent": TRACEPARENT}
    answer, spans = spans_of(traced, "POST", "/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200
    http, work = spans[SpanKind.SERVER], spans[SpanKind.INTERNAL]
    assert http.name == "POST /v1/chat/completions"
    assert dict(http.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    assert f"{http.context.trace_id:032x}" == TRACEPARENT.split("-")[1]
    assert http.parent.span_id == int(TRACEPARENT.split("-")[2], 16)
    assert work.parent.span_id == http.context.span_id
    told = dict(work.attributes)
    assert work.name == "chat a+b"
    assert told["gen_ai.operation.name"] == "chat"
    assert (told["gen_ai.request.model"], told["gen_ai.response.model"]) == ("a+b", "a+b")
    assert (told["gen_ai.request.max_tokens"], told["gen_ai.request.temperature"]) == (5, 0.5)
    assert (told["gen_ai.request.seed"], told["gen_ai.request.top_k"]) == (7, 9.0)
    assert told["gen_ai.response.finish_reasons"] == ("length",)
    assert told["gen_ai.usage.output_tokens"] == 5
    assert told["gen_ai.usage.input_tokens"] > len(SECRET)
    assert told["loraplex.queue_s"] >= 0
    assert ("gen_ai.server.time_to_first_token" in told) == stream
    if not stream:
        assert told["gen_ai.response.id"] == answer.json()["id"]
        assert told["gen_ai.usage.input_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert SECRET not in str([span.to_json() for span in spans.values()])
    assert http.start_time <= work.start_time <= work.end_time


def test_refusals_and_embeddings_have_theirs(traced):
    answer, spans = spans_of(traced, "POST", "/v1/completions", json={"model": "unknown", "prompt": SECRET})
    assert answer.status_code == 404
    assert spans[SpanKind.SERVER].attributes["error.type"] == "model_not_found"
    assert SpanKind.INTERNAL not in spans
    _, spans = spans_of(traced, "POST", "/v1/embeddings", json={"model": "a", "input": [SECRET, "x"]})
    told = spans[SpanKind.INTERNAL].attributes
    assert (told["gen_ai.operation.name"], told["gen_ai.usage.output_tokens"]) == ("embeddings", 0)
    assert told["gen_ai.usage.input_tokens"] == len(SECRET) + 1
    assert spans[SpanKind.SERVER].status.status_code is StatusCode.UNSET


def test_the_environment_turns_them_on_and_off():
    assert tracing_from_environment({}) is None
    assert tracing_from_environment({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}) is None
    assert tracing_from_environment({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}) is None
    with pytest.raises(ConfigError, match="zipkin"):
        tracing_from_environment({"OTEL_TRACES_EXPORTER": "zipkin"})
    with pytest.raises(ConfigError, match="carrier pigeon"):
        tracing_from_environment({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier pigeon"})


def test_the_usual_variables_make_an_exporter(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my server")
    tracing = tracing_from_environment()
    assert tracing is not None
    assert tracing._provider.resource.attributes["service.name"] == "my server"
    tracing.close()


def test_without_the_extra_a_warning_says_so(monkeypatch, caplog):
    monkeypatch.setattr("loraplex.server.tracing.missing_modules", lambda extra: ["opentelemetry.sdk"])
    assert tracing_from_environment({"OTEL_TRACES_EXPORTER": "otlp"}) is None
    assert "loraplex[otel]" in caplog.text
