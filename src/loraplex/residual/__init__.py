"""Linked residual adapters, and attention that can be captured and steered, per row."""

from loraplex.residual.cache import FollowedCache
from loraplex.residual.capture import AttentionCapture, CaptureRequest
from loraplex.residual.format import read_residual, write_residual
from loraplex.residual.modules import (
    FunctionResidual,
    LinkedLayer,
    LinkedResidual,
    ResidualConfig,
    ResidualContext,
    SteeringVector,
)
from loraplex.residual.registry import AttentionRequest
from loraplex.residual.steering import Steering, spans_of_text

__all__ = [
    "AttentionCapture",
    "AttentionRequest",
    "CaptureRequest",
    "FollowedCache",
    "FunctionResidual",
    "LinkedLayer",
    "LinkedResidual",
    "ResidualConfig",
    "ResidualContext",
    "Steering",
    "SteeringVector",
    "read_residual",
    "spans_of_text",
    "write_residual",
]
