"""Residuals from one format to another: pyreft's and control vectors to a folder, vectors to GGUF."""

from pathlib import Path

from loraplex.errors import ConfigError, UnsupportedAdapterError
from loraplex.residual.format import FolderResidual, is_residual_folder, read_residual, write_residual
from loraplex.residual.modules import SteeringVector
from loraplex.residual.other_formats.control_vector import is_control_vector, read_control_vector, write_control_vector
from loraplex.residual.other_formats.pyreft import is_pyreft_folder, read_pyreft
from loraplex.residual.positions import parse_positions


def is_convertible(source: str | Path) -> bool:
    """Whether it is a residual that `convert_residual` takes; PEFT's IA3 is loaded as it is."""
    return is_residual_folder(source) or is_control_vector(source) or is_pyreft_folder(source)


def convert_residual(
    source: Path, target: Path, *, to_gguf: bool, positions: str | None = None, model_type: str | None = None
) -> FolderResidual:
    """Write the residual in `source` as a folder, or as a GGUF control vector; `target` must not exist.

    `positions` are those of pyreft's interventions, `model_type` is the hint of a GGUF file. Raises what reading and
    writing residuals raises, and ConfigError.
    """
    chosen = None if positions is None else parse_positions(positions)
    if is_pyreft_folder(source):
        residual: FolderResidual = read_pyreft(source, chosen)
    elif chosen is not None:
        raise ConfigError(
            "positions are given for interventions of pyreft alone, which doesn't save them. Leave it out."
        )
    else:
        residual = read_control_vector(source) if is_control_vector(source) else read_residual(source)
    if not to_gguf:
        write_residual(residual, target)
        return residual
    if not isinstance(residual, SteeringVector):
        raise UnsupportedAdapterError(
            f"{str(source)!r} is no vector, and GGUF holds control vectors only. Leave --to gguf out."
        )
    if model_type is None:
        raise ConfigError("a control vector in GGUF names the type of its base model. Give it: --base MODEL.")
    write_control_vector(residual, target, model_type)
    return residual
