"""Residuals from folders and files of all formats, told apart by what is in them."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedConfig

from loraplex.errors import AdapterFormatError
from loraplex.json_files import damaged_as
from loraplex.residual.format import FolderResidual, is_residual_folder, read_residual
from loraplex.residual.format_settings import ResidualSettings
from loraplex.residual.other_formats.control_vector import is_control_vector, is_gguf, read_control_vector
from loraplex.residual.other_formats.ia3 import is_ia3_folder, read_ia3
from loraplex.residual.other_formats.pyreft import is_pyreft_folder, read_pyreft
from loraplex.residual.positions import Positions


def is_residual_source(source: str | Path) -> bool:
    """Whether a folder or file holds a residual rather than a LoRA. Raises AdapterFormatError if it can't be read."""
    kinds = (is_residual_folder, is_control_vector, is_ia3_folder, is_pyreft_folder)
    with damaged_as(AdapterFormatError, source):
        return any(is_kind(source) for is_kind in kinds)


def read_any_residual(
    source: str | Path,
    config: PreTrainedConfig,  # of the base model
    *,
    check: Callable[[ResidualSettings], None] | None = None,
    positions: Positions | None = None,
) -> FolderResidual:
    """Read a residual; `check` as in `read_residual`, `positions` of formats that don't save them.

    Raises AdapterFormatError, UnsupportedAdapterError or ConfigError.
    """
    with damaged_as(AdapterFormatError, source):
        is_vector, is_reft = is_gguf(source), is_pyreft_folder(source)
        is_gate = not is_residual_folder(source) and is_ia3_folder(source)
    if is_vector:
        return read_control_vector(source, config.model_type)
    if is_reft:
        return read_pyreft(source, positions)
    if is_gate:
        return read_ia3(source)
    return read_residual(source, check=check)
