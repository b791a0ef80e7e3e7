"""Convert LoRA adapters: pickle files, MLX, GGUF and folders with old names to PEFT's format, and that to GGUF."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel

from loraplex.adapters.other_formats.mlx import is_mlx_folder, read_mlx
from loraplex.adapters.other_formats.pickled import read_pickled
from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.record import RECORD_FILE
from loraplex.adapters.peft.weight_files import GGUF_SUFFIX, PICKLE_SUFFIXES, WEIGHTS_FILE, check_files, has_weights
from loraplex.adapters.peft.writer import write_adapter
from loraplex.adapters.targets import expected_targets
from loraplex.adapters.weights import Adapter
from loraplex.errors import AdapterFormatError, BaseModelError, ConfigError, LoraplexError
from loraplex.json_files import MAX_SETTINGS_BYTES, damaged_as, read_text
from loraplex.layers.base.former_names import layout_of
from loraplex.layers.base.modules import adaptable_modules
from loraplex.models.checkpoints.gguf_names import gguf_names
from loraplex.models.checkpoints.loading import auto_class_for, refuse_damaged_json, resolve_base_model
from loraplex.models.convert.gguf_adapter import read_gguf_adapter, write_gguf_adapter
from loraplex.validation import listed


def convert_to_peft(
    source: Path,
    folder: Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    ignore_unknown: bool = False,
) -> Adapter:
    """Write the adapter in `source`, a folder or a GGUF file, as a PEFT folder, which must not exist; return it.

    `base` is the base model: needed for GGUF, and where modules have other names now. Its weights are not read. `scale`
    is in place of an MLX adapter's. Raises what reading and writing adapters raises.
    """
    model = None if base is None else model_without_weights(base)
    with damaged_as(AdapterFormatError, source):
        adapter = _read(source, model, base, scale, ignore_unknown)
    adapter = _targeting_its_layers(adapter)
    write_adapter(adapter, folder, dtype)
    return adapter


def convert_to_gguf(
    source: Path,
    file: Path,
    *,
    base: str | Path | None = None,
    scale: float | None = None,
    ignore_unknown: bool = False,
) -> Adapter:
    """Write the adapter in `source` as a GGUF file, which must not exist, for llama.cpp; return it.

    `base` is the base model; None takes the one that the adapter names. Raises what reading adapters raises, and
    UnsupportedAdapterError for what llama.cpp has no place for.
    """
    with damaged_as(AdapterFormatError, source):
        if base is None:
            base = _read(source, None, None, scale, ignore_unknown).config.base_model_name_or_path
        if base is None:
            raise ConfigError(f"{str(source)!r} doesn't name its base model. Give it: --base MODEL.")
        model = model_without_weights(base)
        adapter = _read(source, model, base, scale, ignore_unknown)
    write_gguf_adapter(adapter, file, gguf_names(model))
    return adapter


def model_without_weights(path_or_id: str | Path) -> PreTrainedModel:
    """A base model's modules, from its config alone. Raises BaseModelError."""
    source = resolve_base_model(path_or_id)
    refuse_damaged_json(source)
    try:
        config = AutoConfig.from_pretrained(source)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto_class_for(config).from_config(config)
    except Exception as error:  # transformers and the hub raise all kinds
        raise BaseModelError(
            f"can't read the config of base model {source!r}: {type(error).__name__}: {error}. Give a folder with "
            "config.json, or a hub id that can be reached."
        ) from error
    return model


def read_model_type(path_or_id: str | Path) -> str:
    """What kind of model a base model is, from its config alone: "llama". Raises BaseModelError."""
    return str(model_without_weights(path_or_id).config.model_type)


def _read(
    source: Path, model: PreTrainedModel | None, base: str | Path | None, scale: float | None, ignore_unknown: bool
) -> Adapter:
    """The adapter in any of the formats, with the modules' names of `model`."""
    gguf = _gguf_file(source)
    if gguf is not None:
        if model is None:
            raise ConfigError(
                f"{str(gguf)!r} is a GGUF file, whose names and order of rows depend on the base model. Give it: "
                "--base MODEL, a folder with its config.json or a hub id."
            )
        return read_gguf_adapter(gguf, gguf_names(model), str(base))
    layout = None if model is None else layout_of(model, adaptable_modules(model))
    if has_weights(source):
        return read_adapter(source, layout=layout, ignore_unknown=ignore_unknown)
    with _staged(source, scale) as folder:
        adapter = read_adapter(folder, layout=layout, ignore_unknown=ignore_unknown)
    return replace(adapter, places=None)


def _gguf_file(source: Path) -> Path | None:
    """The GGUF file that `source` is, or that is the only weights in it."""
    if source.suffix == GGUF_SUFFIX and source.is_file():
        return source
    if not source.is_dir() or has_weights(source) or is_mlx_folder(source):
        return None
    files = sorted(source.glob(f"*{GGUF_SUFFIX}"))
    if len(files) > 1:
        raise AdapterFormatError(f"{str(source)!r} has {listed([file.name for file in files])}. Name one of the files.")
    return files[0] if files else None


@contextmanager
def _staged(source: Path, scale: float | None) -> Iterator[Path]:
    """A temporary PEFT folder with the tensors of another format under their own names."""
    with tempfile.TemporaryDirectory(prefix="loraplex-convert-") as temporary:
        folder = Path(temporary) / "adapter"
        if is_mlx_folder(source):
            write_adapter(read_mlx(source, scale=scale), folder)
        else:
            _stage_pickle(source, folder)
        yield folder


def _stage_pickle(source: Path, folder: Path) -> None:
    pickles = [] if not source.is_dir() else [path for path in source.iterdir() if path.suffix in PICKLE_SUFFIXES]
    named = [path for path in pickles if path.stem == "adapter_model"] or pickles
    if len(named) != 1 or not (source / CONFIG_FILE).is_file():
        check_files(source)  # raises: what is there, and the fix
        raise AdapterFormatError(f"{str(source)!r} has {listed([path.name for path in named])}. Keep one of them.")
    folder.mkdir()
    for name in (CONFIG_FILE, RECORD_FILE):
        if (source / name).is_file():
            (folder / name).write_text(read_text(source / name, MAX_SETTINGS_BYTES), encoding="utf-8")
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in read_pickled(named[0]).items()
    }
    save_file(tensors, folder / WEIGHTS_FILE)


def _targeting_its_layers(adapter: Adapter) -> Adapter:
    """The adapter with its modules by name as targets, where its own are null or for modules of other names."""
    try:
        shapes = {path: weights.shape for path, weights in adapter.layers.items()}
        if adapter.layers.keys() <= set(expected_targets(adapter.config, shapes)):
            return adapter
    except LoraplexError:  # no targets
        pass
    config = replace(
        adapter.config,
        target_modules=tuple(adapter.layers),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    return replace(adapter, config=config)
