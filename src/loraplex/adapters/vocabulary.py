"""The tokens of an adapter that brings rows of the embedding: how many there are, and its folder's tokenizer."""

import hashlib
import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loraplex.errors import AdapterFormatError, BaseModelMismatchError, UnsupportedAdapterError
from loraplex.json_files import damaged_as, read_object

SETTINGS_FILE = "tokenizer_config.json"
# What makes up a tokenizer, and the bytes that each file may have.
TOKENIZER_FILES = {
    "tokenizer.json": 1 << 26,
    SETTINGS_FILE: 1 << 22,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 1 << 22,
    "vocab.json": 1 << 26,
    "merges.txt": 1 << 26,
    "chat_template.jinja": 1 << 20,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Vocabulary:
    """What stands in the place of the base model's tokens and tokenizer in the rows of one adapter."""

    num_tokens: int  # rows of the embedding
    tokenizer: PreTrainedTokenizerBase | None  # None: the base model's
    identity: str  # equal for adapters with the same tokens


def read_vocabulary(folder: Path | None, num_tokens: int, *, num_base: int) -> Vocabulary:
    """The vocabulary of an adapter whose embedding has so many rows, with the tokenizer in its folder if one is there.

    `num_base` are the base model's: other tokens that no tokenizer names are nobody else's.

    Raises AdapterFormatError or UnsupportedAdapterError for a tokenizer that can't be read, and BaseModelMismatchError
    for one with tokens that have no row.
    """
    if folder is None or not (folder / SETTINGS_FILE).is_file():
        identity = "base" if num_tokens == num_base else secrets.token_hex()
        return Vocabulary(num_tokens=num_tokens, tokenizer=None, identity=identity)
    tokenizer = _read_tokenizer(folder)
    ids = tokenizer.get_vocab()
    largest = max(ids.values(), default=0)
    if largest >= num_tokens:
        raise BaseModelMismatchError(
            f"the tokenizer in {str(folder)!r} has token {largest}, but the embedding has {num_tokens} rows with the "
            "adapter. Save the adapter with its resized embedding (PEFT's save_embedding_layers=True)."
        )
    told = [
        num_tokens,
        sorted(ids.items()),
        str(tokenizer.chat_template),
        sorted(map(str, tokenizer.all_special_tokens)),
    ]
    identity = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return Vocabulary(num_tokens=num_tokens, tokenizer=tokenizer, identity=identity)


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    for name, most in TOKENIZER_FILES.items():
        file = folder / name
        if file.is_file() and file.stat().st_size > most:
            raise AdapterFormatError(f"{file} has {file.stat().st_size} bytes; a tokenizer's may have {most}.")
    with damaged_as(AdapterFormatError, folder):
        read_object(folder / SETTINGS_FILE, AdapterFormatError)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a damaged file makes of it
        raise UnsupportedAdapterError(
            f"the adapter brings rows of the embedding, and the tokenizer in {str(folder)!r} can't be read: "
            f"{type(error).__name__}: {error}. Repair it, or remove its files to use the base model's."
        ) from error
    return tokenizer
