"""A subject: one molecule, crystal, chain or peptide, and what is known of it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a domain's questions are about. Subjects of one `group` are never in two splits."""

    key: str  # its identity: an InChIKey's skeleton, a reduced composition, a sequence
    group: str  # a scaffold, a chemical system, a family
    text: str  # as it stands in questions: SMILES, formula, residues
    values: Mapping[str, float | str] = field(default_factory=dict)  # by property
    name: str = ""  # the IUPAC name of a compound
    reserved: bool = False  # in a held-out file of data/: not for training here either


def write_subjects(path: Path, subjects: Iterable[Subject]) -> None:
    """Write one JSON object a line, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(asdict(subject), ensure_ascii=False) + "\n" for subject in subjects), "utf-8")
    part.replace(path)


def read_subjects(path: Path) -> list[Subject]:
    return [Subject(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def held_out_questions(data: Path, domain: str) -> list[str]:
    """The questions of data/<domain>'s valid and test files; none for a domain that isn't there."""
    files = [data / domain / f"{split}.jsonl" for split in ("valid", "test")]
    lines = [line for file in files if file.exists() for line in file.read_text("utf-8").splitlines()]
    return [json.loads(line)["messages"][0]["content"] for line in lines]
