"""loraplex: one frozen language model, any number of LoRA adapters, one forward pass."""

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.store import StoreConfig
from loraplex.models.multi_lora import MultiLoraModel

__all__ = ["LoraConfig", "MultiLoraModel", "StoreConfig"]
__version__ = "0.1.0"
