"""loraplex: one frozen language model, any number of LoRA adapters, one forward pass."""

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.store import StoreConfig
from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling import SamplingParams
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.xlora.config import XLoraConfig

__all__ = [
    "AsyncEngine",
    "Engine",
    "EngineConfig",
    "LoraConfig",
    "MultiLoraModel",
    "Request",
    "SamplingParams",
    "StoreConfig",
    "XLoraConfig",
]
__version__ = "0.1.0"
