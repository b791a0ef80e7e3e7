"""Training on a frozen base model: many adapters at once, and the scaling heads and routers of mixtures."""

from loraplex.training.adapters.config import AdapterJob
from loraplex.training.adapters.run import train_adapters
from loraplex.training.core.config import EvaluationConfig, OptimizerConfig, StepsConfig, TrainConfig
from loraplex.training.core.results import TrainResult
from loraplex.training.mixture.config import MixtureTrainConfig
from loraplex.training.mixture.run import train_mixture
from loraplex.training.mixture.sources import DataSource
from loraplex.training.routers.config import RouterTrainConfig

__all__ = [
    "AdapterJob",
    "DataSource",
    "EvaluationConfig",
    "MixtureTrainConfig",
    "OptimizerConfig",
    "RouterTrainConfig",
    "StepsConfig",
    "TrainConfig",
    "TrainResult",
    "train_adapters",
    "train_mixture",
]
