"""Find an adapter's folder: a local one, or a download from the Hugging Face hub."""

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from loraplex.adapters.leftovers import restore_replaced
from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.adapters.peft.record import RECORD_FILE
from loraplex.adapters.peft.weight_files import INDEX_FILE, MIXTURE_FILE, SHARDS, WEIGHTS_FILE, has_weights
from loraplex.adapters.prompt_centroid import CENTROID_FILE
from loraplex.adapters.vocabulary import TOKENIZER_FILES
from loraplex.errors import AdapterFormatError, AdapterNotFoundError, UnsupportedAdapterError
from loraplex.json_files import damaged_as

_WEIGHTS = (WEIGHTS_FILE, INDEX_FILE, SHARDS)
_LOG_IN = "log in (hf auth login), or set HF_TOKEN"


def resolve_adapter_folder(
    path_or_id: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Return the local folder of an adapter: `path_or_id` if it exists, else a download of that hub id.

    Only settings, adapter_model.safetensors (or its shards and their index) and a tokenizer's files are downloaded,
    never a pickle file. Files that are in the cache already are not downloaded again. Raises AdapterNotFoundError
    (neither a folder nor to be had from the hub), AdapterFormatError and UnsupportedAdapterError (the hub's repository
    lacks settings or weights, or has a mixture).
    """
    wanted = [CONFIG_FILE, *_WEIGHTS, RECORD_FILE, CENTROID_FILE, MIXTURE_FILE, *TOKENIZER_FILES]
    folder, is_local = _resolve(path_or_id, revision, cache_dir, wanted)
    if is_local:
        return folder
    if (folder / MIXTURE_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        raise UnsupportedAdapterError(f"{path_or_id!r} on the hub is a mixture (X-LoRA). Load it with load_mixture.")
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterFormatError(f"{path_or_id!r} on the hub has no {CONFIG_FILE}, so it is not a PEFT adapter.")
    if not has_weights(folder):
        raise UnsupportedAdapterError(
            f"{path_or_id!r} on the hub has no {WEIGHTS_FILE}. Other formats, such as pickle (.bin), are not "
            "downloaded: reading them can run code. Where you trust it, download it (hf download), convert it "
            "(loraplex convert FOLDER), and load the folder."
        )
    return folder


def resolve_mixture_folder(
    path_or_id: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The same for a mixture, with the adapters in its subfolders; whether it is whole is for its reader to say."""
    return _resolve(path_or_id, revision, cache_dir, ["*.json", "*.safetensors", "*/*.json", "*/*.safetensors"])[0]


def _resolve(
    path_or_id: str | Path, revision: str | None, cache_dir: str | Path | None, patterns: list[str]
) -> tuple[Path, bool]:
    """The folder, and whether it is a local one."""
    with damaged_as(AdapterNotFoundError, path_or_id):
        local = Path(os.path.expanduser(path_or_id))
        restore_replaced(local)
        if local.exists():
            return local, True
    if not may_be_hub_id(path_or_id):
        raise AdapterNotFoundError(
            f"adapter folder {str(path_or_id)!r} does not exist, and it is no hub id (owner/name) either. "
            f"Working directory: {str(Path.cwd())!r}."
        )
    return _download(str(path_or_id), revision, cache_dir, patterns), False


def may_be_hub_id(path_or_id: str | Path) -> bool:
    """Whether it looks like owner/name, instead of a path or a link of adapters."""
    if isinstance(path_or_id, Path) or path_or_id.startswith((".", "/", "~")):
        return False
    return path_or_id.count("/") == 1 and not set(path_or_id) & set(":+")


def _download(repository: str, revision: str | None, cache_dir: str | Path | None, patterns: list[str]) -> Path:
    where = f"{repository!r} is no local folder"
    at = "" if revision is None else f" at revision {revision!r}"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, cache_dir=cache_dir, allow_patterns=patterns
            )
        )
    except HFValidationError as error:
        raise AdapterNotFoundError(f"{where} and no valid hub id (owner/name): {error}") from error
    except GatedRepoError as error:
        raise AdapterNotFoundError(
            f"{where}; on the hub its owner has to grant access. Ask there, then {_LOG_IN}."
        ) from error
    except RevisionNotFoundError as error:
        raise AdapterNotFoundError(f"{where}; on the hub it has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise AdapterNotFoundError(
            f"{where} and not on the hub. Check the name; if it is private, {_LOG_IN}."
        ) from error
    except LocalTokenNotFoundError as error:
        raise AdapterNotFoundError(f"{where}, and the hub asks for a token: {_LOG_IN}.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError) as error:
        raise AdapterNotFoundError(
            f"{where} and not in the hub's local cache{at}, and the hub can't be reached (no network, or "
            "HF_HUB_OFFLINE is set). Connect once to download it, or give a local folder."
        ) from error
    except OSError as error:
        raise AdapterNotFoundError(f"{where}, and the download from the hub{at} failed: {error}") from error
