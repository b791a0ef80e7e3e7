"""What can be set about the server: the one schema of its file, its environment variables and its flags."""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraplex.adapters.names import AUTO
from loraplex.adapters.store.store import StoreConfig
from loraplex.engine.config import EngineConfig
from loraplex.errors import ConfigError
from loraplex.models.checkpoints.smollm2 import ALIAS
from loraplex.models.text.sampling_defaults import SOURCES
from loraplex.server.api.tools.forms import AUTO as ANY_PARSER
from loraplex.server.api.tools.forms import PARSERS
from loraplex.training.service.settings import ServiceLimits
from loraplex.validation import check_least


def option(default: Any, help: str) -> Any:
    """A field with the text that the command line shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model and what is loaded at the start."""

    model: str = option(ALIAS, "Base model: smollm2-135m, a folder, or a hub id.")
    served_name: str = option("", "The base model's name in the API; empty: from the model.")
    dtype: str = option("auto", "Dtype of the base model: float32, bfloat16, float16 or auto: its own.")
    device: str = option("cpu", "Where to compute: cpu, cuda, cuda:1, ...")
    weights: str = option("auto", "int8: linear weights in 8 bits, on a CPU in bfloat16; auto: as the dtype.")
    adapters: Mapping[str, str] = field(
        default_factory=dict, metadata={"help": "NAME=FOLDER of an adapter or residual to load; repeat."}
    )
    mixtures: Mapping[str, str] = field(
        default_factory=dict, metadata={"help": "NAME=FOLDER of a mixture to load; repeat."}
    )
    watch: str = option("", "A folder whose subfolders are loaded, replaced and unloaded as they change.")
    generation_config: str = option(
        "auto", "Sampling of requests that don't say: auto: the model's generation_config; none: temperature 1."
    )
    tool_call_parser: str = option(ANY_PARSER, f"How the model writes calls of tools: {', '.join(PARSERS)}.")

    def __post_init__(self) -> None:
        if self.generation_config not in SOURCES:
            raise ConfigError(f"generation_config is {self.generation_config!r}; it must be one of {list(SOURCES)}.")
        if self.tool_call_parser not in PARSERS:
            raise ConfigError(f"tool_call_parser is {self.tool_call_parser!r}; it must be one of {[*PARSERS]}.")

    @property
    def base_name(self) -> str:
        """What the API calls the base model."""
        return self.served_name or (Path(self.model).name if os.path.isdir(self.model) else self.model)


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Where the server listens."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 is any free one.")
    tls_certificate: str = option("", "PEM file with the certificate chain; turns TLS on.")
    tls_key: str = option("", "PEM file with the certificate's key.")
    tls_client_ca: str = option("", "PEM file: only clients with a certificate of this authority.")
    max_connections: int = option(1024, "Connections and requests at once; more get 503.")
    max_connections_per_address: int = option(512, "Connections of one address at once; more get 429.")
    headers_timeout_s: float = option(10.0, "Seconds for a request's headers to arrive.")
    max_header_bytes: int = option(2**16, "Bytes of a request's headers; more get 431.")
    keep_alive_s: float = option(30.0, "Seconds that an idle connection stays open.")
    drain_s: float = option(30.0, "Seconds that accepted requests may take after SIGTERM.")
    allowed_hosts: tuple[str, ...] = option((), "Without keys, more names by which the server may be called; repeat.")
    cors_origins: tuple[str, ...] = option((), "Origins whose pages may call the API; repeat.")
    replica_loopback: bool = option(True, "With --replicas on one machine, keep all ports of Ray on it.")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be 0 to 65535.")
        if bool(self.tls_certificate) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_certificate):
            raise ConfigError("tls_certificate, tls_key: give both, or neither; tls_client_ca needs both.")
        for name in ("tls_certificate", "tls_key", "tls_client_ca"):
            path = getattr(self, name)
            if path and not os.path.isfile(path):
                raise ConfigError(f"{name} is {path!r}, which is no file.")
        check_least(self, {"max_connections": 1, "max_connections_per_address": 1, "max_header_bytes": 1024})
        check_least(self, {"headers_timeout_s": 0.1, "keep_alive_s": 0, "drain_s": 0})

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """Who may do what."""

    keys_file: str = option("", "File of API keys, made by `loraplex key create`; empty: no keys.")
    max_wrong_keys_per_minute: int = option(60, "Wrong keys of one address; more get 429.")
    allow_anonymous: bool = option(False, "Without keys, listen on addresses that others can reach.")
    open_metrics: bool = option(False, "Show /metrics, which names adapters, without a key.")
    adapter_roots: tuple[str, ...] = option((), "Folders below which the API may load adapters; repeat.")
    prefix_isolation: bool = option(True, "Keys don't share the prefix cache.")
    allow_special_tokens_in_content: bool = option(False, "Messages of chats may write the model's control tokens.")

    def __post_init__(self) -> None:
        for root in self.adapter_roots:
            if not os.path.isdir(root):
                raise ConfigError(f"adapter_roots names {root!r}, which is no folder. Make it first.")
        check_least(self, {"max_wrong_keys_per_minute": 1})


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may ask for."""

    max_body_bytes: int = option(2**21, "Bytes of a request's body; more get 413.")
    max_body_values: int = option(2**18, "JSON values of a body, token ids too; more get 400.")
    body_timeout_s: float = option(30.0, "Seconds for a body to arrive.")
    stall_timeout_s: float = option(60.0, "Seconds after which a reader that takes nothing is disconnected.")
    max_new_tokens: int = option(4096, "New tokens of an answer at most.")
    max_choices: int = option(16, "Answers to one prompt (n).")
    max_prompts: int = option(128, "Prompts of one completion request.")
    max_inputs: int = option(2048, "Texts of one embeddings or score request.")
    max_answers: int = option(256, "Answers of one request: its prompts times n.")
    max_steered_spans: int = option(256, "Spans of all steerings of a request.")
    max_link_length: int = option(8, "Adapters of one link.")
    max_capture_bytes: int = option(2**24, "Bytes of captured attention, and of scalings, that an answer may bring.")

    def __post_init__(self) -> None:
        counts = [name for name in vars(self) if name.startswith("max_")]
        check_least(self, dict.fromkeys(counts, 1) | {"body_timeout_s": 0.1, "stall_timeout_s": 0.1})


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What is written to standard error, one JSON object a line."""

    log_level: str = option("info", "What is logged: debug, info, warning or error.")
    log_requests: bool = option(True, "A line for every request, without its content.")
    log_prompts: bool = option(False, "Prompts and answers too.")

    def __post_init__(self) -> None:
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"log_level is {self.log_level!r}; it must be debug, info, warning or error.")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Training as a service, through the Tinker API."""

    training: bool = option(False, "Let clients train adapters, through the Tinker API (docs/guides/tinker.md).")
    training_folder: str = option("training-runs", "Where runs, checkpoints and sessions lie.")
    training_runs: int = option(16, "Training runs in memory at once; further ones wait for a place.")
    training_max_rank: int = option(128, "Highest LoRA rank of a run.")
    training_tokens: int = option(1024, "Padded tokens of one training pass; larger batches are computed in parts.")
    training_length: int = option(4096, "Tokens of the longest datum; its logits are in memory at once.")
    training_request_tokens: int = option(65536, "Tokens of the data of one forward_backward.")
    training_idle_s: float = option(300.0, "A run without requests for so long leaves memory; its state stays on disk.")
    training_snapshot_steps: int = option(10, "Optimizer steps of a run between two snapshots.")

    def __post_init__(self) -> None:
        self.limits()
        if self.training and not self.training_folder:
            raise ConfigError("training_folder is empty; name the folder that runs are written to.")

    def limits(self) -> ServiceLimits:
        """As the training loop takes them."""
        return ServiceLimits(
            max_runs=self.training_runs,
            max_rank=self.training_max_rank,
            tokens_per_forward=self.training_tokens,
            max_datum_tokens=self.training_length,
            max_request_tokens=self.training_request_tokens,
            idle_s=self.training_idle_s,
            snapshot_steps=self.training_snapshot_steps,
        )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """All settings of the server, one section for each table of the file."""

    model: ModelSettings = field(default_factory=ModelSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    access: AccessSettings = field(default_factory=AccessSettings)
    limits: RequestLimits = field(default_factory=RequestLimits)
    logs: LogSettings = field(default_factory=LogSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_waiting=1024))
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if self.model.base_name == AUTO:
            raise ConfigError(f"the base model can't be called {AUTO!r}: that lets the prompt choose. Set served_name.")
        if not self.access.keys_file and not self.network.is_local and not self.access.allow_anonymous:
            raise ConfigError(
                f"host is {self.network.host!r}, which others can reach, but there is no keys_file: anyone could use "
                "the server. Make keys with `loraplex key create`, or set allow_anonymous."
            )
