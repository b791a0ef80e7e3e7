"""The folder of a merged model: weights, settings, the base's tokenizer, and what it was made of."""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from loraplex.adapters.atomic_dir import atomic_folder, check_destination
from loraplex.errors import AdapterExistsError, BaseModelError
from loraplex.output_files import resolved
from loraplex.routing.adapter_spec import Link

RECORD_FILE = "merged.json"
_VERSION = 1
_SHARD_BYTES = "5GB"

# Of the base, copied as they are: tokenizers, chat templates, processors of images.
_COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("*.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
    *("image_processor_config.json", "video_preprocessor_config.json", "additional_chat_templates"),
)
_WRITTEN = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", RECORD_FILE)


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """What a merged model was made of; stands in its folder as merged.json, which transformers doesn't look at."""

    base: str
    link: Link
    adapters: Mapping[str, str]  # where each was read from


def check_merged_destination(folder: str | Path, sources: Collection[str | Path], *, overwrite: bool) -> None:
    """Raise AdapterExistsError where a merged model may not be written.

    Something is there, unless it is a merged model that may be overwritten and none of the `sources` of this one.
    """
    folder = resolved(folder)
    if folder.exists() and folder in [resolved(source) for source in sources]:
        raise AdapterExistsError(
            f"{str(folder)!r} is what the merged model is made of, so it is not replaced. Choose another folder."
        )
    _check_replaceable(folder, overwrite=overwrite)


def _check_replaceable(folder: Path, *, overwrite: bool) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    known = {name for name in names if any(fnmatch(name, pattern) for pattern in (*_COPIED, *_WRITTEN))}
    ours = known if RECORD_FILE in names else set()  # any other model was not written here
    check_destination(folder, f"a merged model with its {RECORD_FILE}", ours, overwrite=overwrite)


def write_merged_folder(
    base: PreTrainedModel,
    source: str,
    folder: str | Path,
    record: MergeRecord,
    adapters: Sequence[Path] = (),
    *,
    overwrite: bool = False,
) -> None:
    """Write a merged model as transformers' `save_pretrained` does, all or nothing.

    `source` is where the base came from: a folder, or a hub id. Raises AdapterExistsError, OutputError and
    BaseModelError (transformers can't save it, or the base's tokenizer can't be had).
    """
    folder = resolved(folder)
    check = partial(check_merged_destination, folder, [source, *adapters], overwrite=overwrite)
    companions = _companions(source)
    with atomic_folder(folder, check) as temporary:
        _save(base, temporary)
        for path in companions:
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, temporary / path.name)
        content = {
            "format_version": _VERSION,
            "base": record.base,
            "link": [list(pair) for pair in record.link],
            "adapters": dict(record.adapters),
        }
        (temporary / RECORD_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in temporary.glob("*.safetensors"):  # which safetensors makes readable by the owner only
            shutil.copymode(temporary / RECORD_FILE, path)


def _save(base: PreTrainedModel, folder: Path) -> None:
    try:
        base.save_pretrained(folder, max_shard_size=_SHARD_BYTES)
    except OSError:
        raise
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise BaseModelError(
            f"transformers can't save the merged {type(base).__name__}: {type(error).__name__}: {error}. Correct the "
            "base model's settings (generation_config.json, for example), or serve the adapters with it instead."
        ) from error


def _companions(source: str) -> list[Path]:
    """The base's own files that go with the weights, in a local folder."""
    folder = Path(source)
    if not folder.is_dir():
        patterns = [*_COPIED, "additional_chat_templates/*"]
        try:
            folder = Path(snapshot_download(source, allow_patterns=patterns))
        except Exception as error:  # the hub raises all kinds
            raise BaseModelError(
                f"the tokenizer of base model {source!r} can't be had: {type(error).__name__}: {error}. Connect once "
                "to download it, or give a local folder."
            ) from error
    return sorted(path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in _COPIED))
