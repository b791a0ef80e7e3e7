"""OpenTelemetry traces, where the usual OTEL_* variables ask for them: a request, and in it what the engine did.

The attributes are those of the semantic conventions for HTTP and for generative AI (gen_ai.*). Prompts and answers are
in none of them.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraplex.engine.request import Request, RequestResult
from loraplex.errors import ConfigError
from loraplex.extras import install_command, missing_modules

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
    "/v1/score": "embeddings",
}
_MAX_MODEL_CHARACTERS = 256


def tracing_from_environment(environment: Mapping[str, str] | None = None) -> "Tracing | None":
    """What the variables ask for; None: nothing. Raises ConfigError for exporters and protocols that are unknown.

    Without the extra a warning is logged, since such variables may be meant for others.
    """
    variables = os.environ if environment is None else environment
    name = variables.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    has_endpoint = any(variables.get(endpoint) for endpoint in _ENDPOINTS)
    if variables.get("OTEL_SDK_DISABLED", "").lower() == "true" or name == "none" or not (name or has_endpoint):
        return None
    missing = missing_modules("otel")
    if missing:
        message = "OTEL_* variables ask for traces, which need %s. Install the extra: %s"
        logger.warning(message, ", ".join(missing), install_command("otel"))
        return None
    return Tracing(_provider(_exporter(name or "otlp", variables)))


def _exporter(name: str, variables: Mapping[str, str]) -> "SpanExporter":
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if name != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER is {name!r}; it must be otlp, console or none.")
    protocol = next((variables[protocol] for protocol in _PROTOCOLS if variables.get(protocol)), "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigError(f"the protocol of OTLP is {protocol!r}; it must be http/protobuf.")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _provider(exporter: "SpanExporter") -> "TracerProvider":
    """With the sampler, limits, resource and batches that the variables set."""
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "loraplex"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class Tracing:
    """Makes the spans of one server."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        import loraplex

        self._provider = provider
        self._tracer = provider.get_tracer("loraplex", loraplex.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Send what is left; takes until the exporter's timeout."""
        self._provider.shutdown()

    # HTTP

    def begin(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> "Span":
        """A request's span, below the client's where it sends a traceparent."""
        from opentelemetry.trace import SpanKind

        carrier = {name: headers.get(name.encode(), b"").decode("latin-1") for name in ("traceparent", "tracestate")}
        parent = self._propagator.extract({name: value for name, value in carrier.items() if value})
        attributes = {"http.request.method": method, "url.path": path[:_MAX_MODEL_CHARACTERS]}
        return self._tracer.start_span(method, context=parent, kind=SpanKind.SERVER, attributes=attributes)

    def end(self, span: "Span", method: str, route: str, status: int, log: Mapping[str, Any]) -> None:
        from opentelemetry.trace import StatusCode

        span.update_name(f"{method} {route}")
        span.set_attribute("http.route", route)
        if status:
            span.set_attribute("http.response.status_code", status)
        code = log.get("code") or (log.get("ended") if log.get("ended") in ("disconnected", "stalled") else None)
        if code is not None:
            span.set_attribute("error.type", str(code))
        if status >= 500 or (code is not None and status == 200):
            span.set_status(StatusCode.ERROR)
        span.end()

    # The engine's work

    def begin_generation(self, parent: "Span | None", path: str, model: str, requests: Sequence[Request]) -> "Span":
        """The span of one HTTP request's requests in the engine."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        operation = _OPERATIONS.get(path, "text_completion")
        asked = {"gen_ai.operation.name": operation, "gen_ai.provider.name": "loraplex", "gen_ai.request.model": model}
        return self._tracer.start_span(
            f"{operation} {model}",
            context=None if parent is None else set_span_in_context(parent),
            kind=SpanKind.INTERNAL,
            attributes=asked | _request_attributes(requests[0], operation, len(requests)),
        )

    def end_generation(
        self,
        span: "Span",
        *,
        results: Sequence[RequestResult],
        response: Mapping[str, Any],
        first_token_s: float | None,
        error: BaseException | None,
    ) -> None:
        from opentelemetry.trace import StatusCode

        if "id" in response:
            span.set_attribute("gen_ai.response.id", response["id"])
        if results:
            span.set_attributes(_result_attributes(results, str(response.get("model", ""))))
        if first_token_s is not None:
            span.set_attribute("gen_ai.server.time_to_first_token", first_token_s)
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR)
        span.end(time.time_ns())


def _request_attributes(request: Request, operation: str, num_prompts: int) -> dict[str, Any]:
    if operation == "embeddings":
        return {"gen_ai.request.encoding_formats": ["float"], "loraplex.prompts": num_prompts}
    sampling = request.sampling
    told: dict[str, Any] = {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": float(sampling.temperature),
        "gen_ai.request.top_p": float(sampling.top_p),
        "gen_ai.request.presence_penalty": float(sampling.presence_penalty),
        "gen_ai.request.frequency_penalty": float(sampling.frequency_penalty),
        "loraplex.prompts": num_prompts,
    }
    if sampling.top_k:
        told["gen_ai.request.top_k"] = float(sampling.top_k)
    if sampling.seed is not None:
        told["gen_ai.request.seed"] = sampling.seed
    if sampling.n > 1:
        told["gen_ai.request.choice.count"] = sampling.n
    return told


def _result_attributes(results: Sequence[RequestResult], model: str) -> dict[str, Any]:
    completions = [completion for result in results for completion in result.completions]
    told: dict[str, Any] = {
        "gen_ai.response.finish_reasons": [completion.finish_reason for completion in completions],
        "gen_ai.usage.input_tokens": sum(len(result.prompt_token_ids) for result in results),
        "gen_ai.usage.output_tokens": sum(len(completion.token_ids) for completion in completions),
        "gen_ai.usage.cache_read.input_tokens": sum(result.num_cached_tokens for result in results),
    }
    waits = [result.queue_s for result in results if result.queue_s is not None]
    if waits:
        told["loraplex.queue_s"] = max(waits)
    return told | ({"gen_ai.response.model": model} if model else {})
