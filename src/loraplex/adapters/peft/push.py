"""Upload an adapter's folder to the Hugging Face hub, with its model card."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.adapters.peft.record import RECORD_FILE
from loraplex.adapters.peft.weight_files import INDEX_FILE, SHARDS, WEIGHTS_FILE, has_weights
from loraplex.adapters.prompt_centroid import CENTROID_FILE
from loraplex.adapters.vocabulary import TOKENIZER_FILES
from loraplex.errors import AdapterFormatError, ConfigError, RemoteError
from loraplex.validation import quoted

CARD_FILE = "README.md"
_FILES = [CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, SHARDS, RECORD_FILE, CENTROID_FILE, CARD_FILE, *TOKENIZER_FILES]
_LOG_IN = "Log in (hf auth login), or set HF_TOKEN, with a token that may write"


def push_adapter(folder: str | Path, repo_id: str, *, private: bool = False, message: str | None = None) -> str:
    """Upload a PEFT folder to `repo_id`, which is made if it isn't there; return the address of the commit.

    Only an adapter's own files are uploaded, in one commit. Raises ConfigError (no such name is possible, or there is
    no token), AdapterFormatError (no adapter is there) and RemoteError (the hub doesn't take it).
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file() or not has_weights(folder):
        raise AdapterFormatError(f"{str(folder)!r} has no {CONFIG_FILE} and weights, so it is no adapter to push.")
    check_can_push(repo_id)
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            allow_patterns=_FILES,
            commit_message=message or "Upload an adapter trained with loraplex",
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise RemoteError(
            f"the hub did not take {str(folder)!r} as {repo_id!r}: {error}. The folder is as it was; try again: "
            f"loraplex push {folder} {repo_id}"
        ) from error
    return str(commit.commit_url)


def check_can_push(repo_id: str) -> None:
    """Raise ConfigError for a name that the hub doesn't have, or without a token: before anything is computed."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{quoted(repo_id)} can't be a repository of the hub: {error}") from error
    if huggingface_hub.get_token() is None:
        raise ConfigError(f"there is no token to push {repo_id!r} with. {_LOG_IN}.")


def repo_of(namespace: str, name: str) -> str:
    """Where an adapter of a run goes: names on the hub have no parts."""
    return f"{namespace}/{re.sub('/+', '-', name)}"
