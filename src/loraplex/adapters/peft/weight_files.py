"""The files that hold an adapter's weights: one, or several with an index."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex.adapters.peft.base_layout import BaseLayout
from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.adapters.peft.tensor_names import under_peft_names
from loraplex.adapters.sharded_file import open_sharded_file
from loraplex.adapters.tensor_file import TensorFile, open_tensor_file
from loraplex.errors import AdapterFormatError, UnsupportedAdapterError
from loraplex.validation import listed

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "adapter_model.safetensors.index.json"
SHARDS = "adapter_model-*.safetensors"
MLX_FILE = "adapters.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GGUF_SUFFIX = ".gguf"
MIXTURE_FILE = "xlora_config.json"  # of the original package's mixtures
ARROW_ROUTER = "arrow_router"  # PEFT's name for the router among the adapters of create_arrow_model

_MAX_LOOKED_AT = 1000  # subfolders
_NEEDED = f"An adapter in PEFT's format is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}."


@contextmanager
def open_weights(folder: Path, layout: BaseLayout | None = None) -> Iterator[TensorFile]:
    """The tensors in an adapter's folder, under PEFT's names for the base model of `layout`.

    Raises AdapterFormatError for files that are damaged.
    """
    whole = (folder / WEIGHTS_FILE).is_file()
    with open_tensor_file(folder / WEIGHTS_FILE) if whole else open_sharded_file(folder / INDEX_FILE) as file:
        yield under_peft_names(file, layout)


def weight_files(folder: Path) -> list[Path]:
    """The files that `open_weights` reads."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    return [folder / INDEX_FILE, *sorted(folder.glob(SHARDS))]


def has_weights(folder: Path) -> bool:
    """Whether an adapter's weights are there, whole or in shards."""
    return (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()


def check_files(folder: Path) -> None:
    """Raise unless `folder` has the files of a PEFT adapter; the message says what is there instead, and the fix."""
    if not folder.is_dir():
        if folder.suffix == GGUF_SUFFIX and folder.exists():
            raise UnsupportedAdapterError(f"{str(folder)!r} is a GGUF file. {_conversion(folder)}")
        what = "is a file" if folder.exists() else "does not exist"
        raise AdapterFormatError(f"adapter folder {str(folder)!r} {what}. {_NEEDED}")
    has_config = (folder / CONFIG_FILE).is_file()
    if has_config and has_weights(folder):
        return
    found = sorted(path.name for path in folder.iterdir())
    if not has_config and MIXTURE_FILE in found:
        raise UnsupportedAdapterError(
            f"{str(folder)!r} holds a mixture (X-LoRA), not an adapter. Load it with load_mixture (--load-mixture "
            "NAME=FOLDER)."
        )
    for what, files in _other_formats(found, has_config).items():
        if files:
            raise UnsupportedAdapterError(
                f"adapter folder {str(folder)!r} has its weights in {what} ({listed(files)}). {_conversion(folder)}"
            )
    file = WEIGHTS_FILE if has_config else CONFIG_FILE
    inner = _adapters_below(folder)
    if ARROW_ROUTER in inner:
        raise UnsupportedAdapterError(
            f"{str(folder)!r} holds a mixture (PEFT's Arrow), not an adapter. Load it with load_mixture "
            "(--load-mixture NAME=FOLDER)."
        )
    if inner:
        raise AdapterFormatError(
            f"adapter folder {str(folder)!r} has no {file}; the adapters {listed(inner)} are below it. Load one of "
            f"them: {str(folder / inner[-1])!r}."
        )
    raise AdapterFormatError(f"adapter folder {str(folder)!r} has no {file}; it holds [{listed(found)}]. {_NEEDED}")


def _other_formats(found: list[str], has_config: bool) -> dict[str, list[str]]:
    """The files of formats that `loraplex convert` reads, by what they are."""
    pickles = [name for name in found if name.endswith(PICKLE_SUFFIXES)]
    return {
        "MLX's format": [name for name in found if name == MLX_FILE],
        "a GGUF file": [name for name in found if name.endswith(GGUF_SUFFIX)],
        "a pickle file, which can run code when it is read": pickles if has_config else [],
    }


def _conversion(folder: Path) -> str:
    return f"Convert it to safetensors: loraplex convert {str(folder)!r}."


def _adapters_below(folder: Path) -> list[str]:
    """The subfolders with an adapter, checkpoints in the order of their numbers."""
    folders = [path for path, _ in zip(sorted(folder.iterdir()), range(_MAX_LOOKED_AT), strict=False)]
    inner = [path.name for path in folders if (path / CONFIG_FILE).is_file() and not path.name.startswith(".")]
    return sorted(inner, key=lambda name: [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", name)])
