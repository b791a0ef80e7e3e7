"""Scalings in one safetensors file: the values as tensors, the names as JSON in its metadata."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraplex.errors import OutputError, ScalingsError, ScalingsFileError
from loraplex.json_files import open_regular, parse_json
from loraplex.output_files import whole_file
from loraplex.xlora.scalings.row_scalings import RowScalings

_KEY = "loraplex_scalings"
_VERSION = 1


def write_scalings(rows: Sequence[RowScalings], path: str | Path) -> None:
    """Write rows, in order, to the one file `path`; it is replaced as a whole, or left as it was.

    Raises ScalingsFileError if it can't be written.
    """
    path = Path(path)
    sources = list(dict.fromkeys((row.mixture, row.experts, row.layers) for row in rows))  # few, for many rows
    indices = {source: index for index, source in enumerate(sources)}
    content = {
        "version": _VERSION,
        "sources": [{"mixture": name, "experts": experts, "layers": layers} for name, experts, layers in sources],
        "rows": [indices[row.mixture, row.experts, row.layers] for row in rows],
    }
    tensors: dict[str, Tensor] = {}
    for index, row in enumerate(rows):
        tensors[f"{index}.values"] = row.values.cpu().contiguous().clone()  # rows may share memory
        tensors[f"{index}.token_ids"] = torch.tensor(row.token_ids, dtype=torch.int64)
    try:
        with whole_file(path, _is_scalings) as temporary:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(content)})
    except (OutputError, SafetensorError) as error:
        raise ScalingsFileError(
            f"{path} can't be written: {error}. Choose a file in a folder with room that you may write to."
        ) from error


def read_scalings(path: str | Path) -> list[RowScalings]:
    """Return the rows of a file that `write_scalings` wrote; raises ScalingsFileError for any other."""
    path = Path(path)
    try:
        # The opened file itself: safetensors would wait for ever for a pipe
        with open_regular(path) as opened, safe_open(f"/dev/fd/{opened.fileno()}", framework="pt") as file:
            content = parse_json((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if content["version"] != _VERSION:
            raise ScalingsFileError(
                f"{path} has version {content['version']}, this loraplex reads version {_VERSION}. Read it with "
                "the version that wrote it."
            )
        return _rows(content, tensors)
    except (
        OSError,
        SafetensorError,
        ScalingsError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
    ) as error:
        if isinstance(error, ScalingsFileError):
            raise
        raise ScalingsFileError(
            f"{path} is not a file of scalings that can be read: {type(error).__name__}: {error}. Expected the "
            "safetensors file that a scalings log or RowScalings was written to."
        ) from error


def _is_scalings(path: Path) -> bool:
    with path.open("rb") as file:
        return _KEY.encode() in file.read(256)  # safetensors has the metadata first


def _rows(content: dict[str, Any], tensors: dict[str, Tensor]) -> list[RowScalings]:
    rows = []
    for index, source in enumerate(content["rows"]):
        names = content["sources"][source]
        rows.append(
            RowScalings(
                mixture=str(names["mixture"]),
                experts=tuple(names["experts"]),
                layers=tuple(names["layers"]),
                token_ids=tuple(tensors[f"{index}.token_ids"].tolist()),
                values=tensors[f"{index}.values"],
            )
        )
    return rows
