"""Linked residual adapters, interventions on hidden states, attention that can be captured and steered: per row."""

from loraplex.residual.cache import FollowedCache
from loraplex.residual.capture import AttentionCapture, CaptureRequest
from loraplex.residual.format import read_residual, write_residual
from loraplex.residual.gates import GateResidual
from loraplex.residual.modules import (
    FunctionResidual,
    LinkedLayer,
    LinkedResidual,
    ResidualConfig,
    ResidualContext,
    SteeringVector,
)
from loraplex.residual.other_formats.control_vector import read_control_vector, write_control_vector
from loraplex.residual.other_formats.ia3 import read_ia3
from loraplex.residual.other_formats.pyreft import read_pyreft
from loraplex.residual.positions import Positions, parse_positions
from loraplex.residual.reft import Intervention, ReftResidual
from loraplex.residual.registry import AttentionRequest
from loraplex.residual.steering import Steering, spans_of_text

__all__ = [
    "AttentionCapture",
    "AttentionRequest",
    "CaptureRequest",
    "FollowedCache",
    "FunctionResidual",
    "GateResidual",
    "Intervention",
    "LinkedLayer",
    "LinkedResidual",
    "Positions",
    "ReftResidual",
    "ResidualConfig",
    "ResidualContext",
    "Steering",
    "SteeringVector",
    "parse_positions",
    "read_control_vector",
    "read_ia3",
    "read_pyreft",
    "read_residual",
    "spans_of_text",
    "write_control_vector",
    "write_residual",
]
