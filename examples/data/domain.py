"""What a domain is: where its rows come from, and the page that says so."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packages import Package
from rows import Row


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One question-answering task made from one package."""

    name: str
    title: str
    package: Package
    members: tuple[str, ...]  # files read inside the package
    labels: tuple[str, ...]
    read: Callable[[Path, int], list[Row]]  # (package file, seed) -> unique rows
    num_train: int
    rules: tuple[str, ...]  # cuts, what was left out, how it was split
    citations: tuple[str, ...]
    licence: str


def bullets(lines: tuple[str, ...]) -> str:
    """Return the lines as a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def count_table(domain: Domain, splits: Mapping[str, list[Row]]) -> str:
    """Return a Markdown table: rows and groups of each split, and rows of each label."""
    lines = [
        f"| split | rows | groups | {' | '.join(domain.labels)} | majority share |",
        "|---" * (len(domain.labels) + 4) + "|",
    ]
    for name in ("train", "valid", "test"):
        counts = Counter(row.answer for row in splits[name])
        cells = [str(counts[label]) for label in domain.labels]
        groups = len({row.group for row in splits[name]})
        share = max(counts.values()) / len(splits[name])
        lines.append(f"| {name} | {len(splits[name])} | {groups} | {' | '.join(cells)} | {share:.3f} |")
    return "\n".join(lines)


def source_page(domain: Domain, splits: Mapping[str, list[Row]], seed: int) -> str:
    """Return the Markdown page on a domain's origin, rules and counts."""
    package = domain.package
    files = "\n".join(f"- `{member}`" for member in domain.members)
    example = splits["train"][0]
    return f"""# {domain.title}

Made by `python examples/data/make_data.py --domain {domain.name} --seed {seed}`; don't edit by hand.

> {example.question}
> **{example.answer}**

## Source

PyPI package `{package.name}` {package.version}, file `{package.file}`
sha256 `{package.sha256}`

{files}

{bullets(domain.citations)}

## Licence

The package: {package.licence}. {domain.licence}

## Rules

{bullets(domain.rules)}

## Counts

{count_table(domain, splits)}
"""
