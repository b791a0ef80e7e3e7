"""What the base install leaves out: each extra, the modules that it brings, and the error that names it."""

import importlib.util
from collections.abc import Mapping

from loraplex.errors import MissingExtraError

# Modules that loraplex imports of each extra; pyproject.toml has the packages.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "server": (
        *("fastapi", "uvicorn", "httptools", "pydantic", "prometheus_client"),
        *("orjson", "filelock"),
    ),
    "tinker": ("google.protobuf",),
    "plots": ("matplotlib", "PIL"),
    "images": ("PIL",),
    "smollm2": ("gguf",),
    "json": ("llguidance",),
    "quantized": ("bitsandbytes", "compressed_tensors"),
    "torchao": ("torchao",),
    "ray": ("ray",),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "vllm": ("vllm",),
    "bench": ("httpx",),
}


def missing_modules(extra: str) -> list[str]:
    """The modules of an extra that aren't installed; nothing is imported."""
    return [name for name in EXTRAS[extra] if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def install_command(extra: str) -> str:
    """What brings an extra."""
    return f"pip install 'loraplex[{extra}]'"


def require_extra(extra: str, what: str) -> None:
    """Raise MissingExtraError, in the name of what needs it, where a module of an extra isn't installed."""
    missing = missing_modules(extra)
    if missing:
        raise MissingExtraError(
            f"{what} needs {', '.join(missing)}, which the base install leaves out. Install the extra: "
            f"{install_command(extra)}."
        )
