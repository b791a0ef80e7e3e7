"""Write a mixture as a folder in PEFT's or the original package's layout, all or nothing."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loraplex.adapters.atomic_dir import atomic_folder
from loraplex.adapters.names import check_name
from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.record import RECORD_FILE
from loraplex.adapters.peft.weight_files import WEIGHTS_FILE
from loraplex.adapters.peft.writer import write_or_copy
from loraplex.adapters.prompt_centroid import CENTROID_FILE
from loraplex.adapters.weights import Adapter
from loraplex.errors import AdapterExistsError, AdapterFormatError, ConfigError, LoraplexError
from loraplex.output_files import resolved
from loraplex.validation import listed
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.formats.folders import read_mixture_folder
from loraplex.xlora.formats.head_tensors import check_head
from loraplex.xlora.formats.mixture_folder import LAYOUTS, Layout, MixtureFolder
from loraplex.xlora.formats.original_layout import HEAD_FILE, SETTINGS_FILE, write_original_layout
from loraplex.xlora.formats.peft_experts import NAMES_FILE
from loraplex.xlora.formats.peft_layout import check_peft_can_hold, write_peft_layout

_EXPERT_FILES = {CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, CENTROID_FILE, "README.md"}
_MIXTURE_FILES = _EXPERT_FILES | {NAMES_FILE, SETTINGS_FILE, HEAD_FILE}


def write_mixture_folder(
    folder: str | Path,
    *,
    layout: Layout,
    config: XLoraConfig,
    hidden_size: int,
    head_state: Mapping[str, Tensor],
    experts: Mapping[str, Adapter | Path],
    base_model_name: str | None,
    overwrite: bool = False,
) -> None:
    """Write a mixture so that `read_mixture_folder` and the layout's own package read it back.

    `head_state` is ScalingHead.state_dict(); `experts` stand in the head's order, and those given by folder are
    copied unchanged. All or nothing, like `write_adapter`. Raises AdapterExistsError (the folder exists and
    `overwrite` is False, or it is not only a mixture), ConfigError, AdapterFormatError and
    UnsupportedAdapterError (the result would not be read, or the layout has no place for a setting).
    """
    folder = resolved(folder)
    adapters = _check_writable(layout, config, hidden_size, head_state, experts)
    mixture = MixtureFolder(
        layout=layout,
        config=config,
        hidden_size=hidden_size,
        head={name: tensor.detach().cpu().contiguous().clone() for name, tensor in head_state.items()},
        expert_names=tuple(experts),
        experts={},
        base_model_name=base_model_name,
        num_layers=None,
    )
    with atomic_folder(folder, lambda: _check_destination(folder, overwrite)) as temporary:
        if layout == "peft":
            write_peft_layout(temporary, folder, mixture, task_type=_common_task_type(adapters))
        else:
            write_original_layout(temporary, mixture)
        for number, (name, expert) in enumerate(experts.items()):
            write_or_copy(expert, temporary / (str(number) if layout == "peft" else name))
        for path in temporary.rglob("*.safetensors"):
            shutil.copymode(path.parent / _settings_beside(path), path)  # safetensors makes it the owner's only


def _settings_beside(tensors: Path) -> str:
    return SETTINGS_FILE if tensors.name == HEAD_FILE else CONFIG_FILE


def _common_task_type(adapters: Mapping[str, Adapter]) -> str | None:
    task_types = {adapter.config.task_type for adapter in adapters.values()}
    return task_types.pop() if len(task_types) == 1 else None


def _check_writable(
    layout: Layout,
    config: XLoraConfig,
    hidden_size: int,
    head: Mapping[str, Tensor],
    experts: Mapping[str, Adapter | Path],
) -> dict[str, Adapter]:
    """Return the experts, read; raise if `read_mixture_folder` would refuse what is to be written."""
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; choose one of {list(LAYOUTS)}.")
    if layout == "peft":
        check_peft_can_hold(config)
    config.check_num_experts(len(experts))
    _check_names(list(experts))
    for name, tensor in head.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise AdapterFormatError(
                f"the scaling head's {name!r} has dtype {tensor.dtype}; it must be floating point."
            )
    adapters = {
        name: expert if isinstance(expert, Adapter) else read_adapter(expert) for name, expert in experts.items()
    }
    num_layers = len({path for adapter in adapters.values() for path in adapter.layers})
    check_head(head, config, hidden_size=hidden_size, num_experts=len(experts), num_layers=num_layers)
    return adapters


def _check_names(names: list[str]) -> None:
    for name in names:
        check_name(name)
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise ConfigError(
                f"expert {name!r} would be written outside of the mixture's folder or to an odd place. Use names "
                "without empty parts, '.' and '..', such as 'team/protein'."
            )
        inside = [other for other in names if other != name and name.startswith(f"{other}/")]
        if inside or name in _MIXTURE_FILES:
            taken = f"the folder of expert {inside[0]!r}" if inside else "a file of the mixture"
            raise ConfigError(f"expert {name!r} would be written into {taken}. Rename one of them.")


def _check_destination(folder: Path, overwrite: bool) -> None:
    """Raise unless nothing is at `folder`, or `overwrite` is set and nothing but a mixture's own files is there."""
    if not folder.exists():
        return
    if not overwrite:
        raise AdapterExistsError(f"{str(folder)!r} exists already. Choose another folder, or pass overwrite=True.")
    if not folder.is_dir():
        raise AdapterExistsError(f"{str(folder)!r} is a file, so it is not overwritten. Choose another folder.")
    if not any(folder.iterdir()):
        return
    try:
        experts = read_mixture_folder(folder).experts.values()
    except LoraplexError as error:
        raise AdapterExistsError(
            f"{str(folder)!r} is not a whole mixture ({error}), so it is not overwritten. Choose another folder, or "
            "remove this one."
        ) from error
    own = {folder / file for file in _MIXTURE_FILES}
    own |= {Path(expert) / file for expert in experts for file in _EXPERT_FILES}
    others = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path not in own]
    if others:
        raise AdapterExistsError(
            f"{str(folder)!r} is not only a mixture, it holds {listed(others)}, so it is not overwritten. Choose "
            "another folder, or move these files away."
        )
