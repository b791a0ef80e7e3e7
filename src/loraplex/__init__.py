"""loraplex: one frozen language model, any number of LoRA adapters, one forward pass."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplex.adapters.config import LoraConfig
    from loraplex.adapters.store.store import StoreConfig
    from loraplex.engine.async_engine import AsyncEngine
    from loraplex.engine.config import EngineConfig
    from loraplex.engine.engine import Engine
    from loraplex.engine.request import Request
    from loraplex.engine.sampling.params import SamplingParams
    from loraplex.models.auto.selection import AutoChoice, Candidates
    from loraplex.models.multi_lora import MultiLoraModel
    from loraplex.routers.config import ArrowConfig, LinearRouterConfig, SpectrConfig, StaticRouterConfig
    from loraplex.xlora.config import XLoraConfig

__all__ = [
    "ArrowConfig",
    "AsyncEngine",
    "AutoChoice",
    "Candidates",
    "Engine",
    "EngineConfig",
    "LinearRouterConfig",
    "LoraConfig",
    "MultiLoraModel",
    "Request",
    "SamplingParams",
    "SpectrConfig",
    "StaticRouterConfig",
    "StoreConfig",
    "XLoraConfig",
]
__version__ = "0.1.0"

# Imported when first asked for: every process of vLLM's imports loraplex (its plugin), most of them for nothing more.
_MODULES = {
    "StaticRouterConfig": "loraplex.routers.config",
    "LinearRouterConfig": "loraplex.routers.config",
    "SpectrConfig": "loraplex.routers.config",
    "ArrowConfig": "loraplex.routers.config",
    "AsyncEngine": "loraplex.engine.async_engine",
    "AutoChoice": "loraplex.models.auto.selection",
    "Candidates": "loraplex.models.auto.selection",
    "Engine": "loraplex.engine.engine",
    "EngineConfig": "loraplex.engine.config",
    "LoraConfig": "loraplex.adapters.config",
    "MultiLoraModel": "loraplex.models.multi_lora",
    "Request": "loraplex.engine.request",
    "SamplingParams": "loraplex.engine.sampling.params",
    "StoreConfig": "loraplex.adapters.store.store",
    "XLoraConfig": "loraplex.xlora.config",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Public names: {', '.join(__all__)}.")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
