"""Where a mixture's training records come from: files or records in memory, each with a name and a share."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.errors import ConfigError, DatasetError
from loraplex.training.core.checks import check_number
from loraplex.training.data.records import FORMS, Record, add_content, parse_record, read_records

Data = str | Path | Sequence[Mapping[str, Any]]  # a JSONL file, or what its lines would say


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One domain's records."""

    data: Data
    name: str | None = None  # in logs; None: the file, or "records 0", "records 1" ...
    share: float | None = None  # of the records of an epoch, relative to the other sources; None for all: every record

    def __post_init__(self) -> None:
        if self.share is not None:
            check_number(f"data source {self.name or self.data!r}", "share", self.share, above=0)


def as_sources(data: Sequence[Data | DataSource], option: str = "data") -> list[DataSource]:
    """Give every source a name. Raises ConfigError for none, two of one name, or shares on some only."""
    if isinstance(data, str | Path) or not data:
        raise ConfigError(f"{option} is {data!r}; give a list of JSONL files, DataSources or lists of records.")
    sources = []
    for number, item in enumerate(data):
        source = item if isinstance(item, DataSource) else DataSource(data=item)
        default = str(source.data) if isinstance(source.data, str | Path) else f"records {number}"
        sources.append(DataSource(data=source.data, name=source.name or default, share=source.share))
    names = [source.name for source in sources]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{option} has several sources called {twice[0]!r}. Give each a name of its own: {names}.")
    with_share = [source.name for source in sources if source.share is not None]
    if with_share and len(with_share) < len(sources):
        raise ConfigError(f"{option} has shares for {with_share} only. Give each of {names} a share, or none of them.")
    return sources


def read_source(source: DataSource) -> list[Record]:
    """Raises DatasetError, which names file and line, or source and number."""
    if isinstance(source.data, str | Path):
        return read_records(source.data)
    if not source.data:
        raise DatasetError(f"data source {source.name!r} has no records. Give at least one of {FORMS}.")
    return [parse_record(_dumped(record, source, i), f"{source.name}:{i}") for i, record in enumerate(source.data)]


def add_source(digest: "hashlib._Hash", source: DataSource) -> None:
    """Add a source's content to a digest: a checkpoint belongs to it. Raises DatasetError."""
    if isinstance(source.data, str | Path):
        add_content(digest, source.data)
    else:
        digest.update(json.dumps(list(source.data), sort_keys=True).encode())


def _dumped(record: Mapping[str, Any], source: DataSource, number: int) -> str:
    try:
        return json.dumps(record)
    except (TypeError, ValueError, RecursionError) as error:
        raise DatasetError(f"{source.name}:{number} can't be a record: {error}. It must be one of {FORMS}.") from error
