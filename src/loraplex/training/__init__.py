"""Training of many adapters at once on one shared frozen base model."""

from loraplex.training.config import AdapterJob, TrainConfig
from loraplex.training.run import TrainResult, train_adapters

__all__ = ["AdapterJob", "TrainConfig", "TrainResult", "train_adapters"]
