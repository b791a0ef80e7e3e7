"""loraplex: one frozen language model, any number of LoRA adapters, one forward pass."""

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.store import StoreConfig
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.xlora.config import XLoraConfig

__all__ = ["LoraConfig", "MultiLoraModel", "StoreConfig", "XLoraConfig"]
__version__ = "0.1.0"
