"""Training on a frozen base model: many adapters at once, and the scaling heads of mixtures."""

from loraplex.training.adapters.run import TrainResult, train_adapters
from loraplex.training.config import AdapterJob, TrainConfig
from loraplex.training.mixture.config import MixtureTrainConfig
from loraplex.training.mixture.run import MixtureTrainResult, train_mixture
from loraplex.training.mixture.sources import DataSource

__all__ = [
    "AdapterJob",
    "DataSource",
    "MixtureTrainConfig",
    "MixtureTrainResult",
    "TrainConfig",
    "TrainResult",
    "train_adapters",
    "train_mixture",
]
