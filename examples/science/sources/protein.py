"""Protein structure: the secondary structure of chains (Protein Data Bank, GOR's file of June 2016)."""

from collections import defaultdict
from pathlib import Path

from packages import Package, open_member

from examples.science.subject import Subject, held_out_questions

PACKAGE = Package(
    name="gor4",
    version="1.0.1",
    file="gor4-1.0.1.tar.gz",
    sha256="a0c754e890c26ceb3f1b9501433a52e7ff866f79e23584b1c0843b36304373e5",
    licence="MIT",
)
SEQUENCES = "gor4-1.0.1/gor4/data/new-gor4.seq"
STRUCTURES = "gor4-1.0.1/gor4/data/new-gor4.obs"
SHARED_RUN = 10  # residues in common that make two chains relatives
MIN_RESIDUES = 30


def _records(archive: Path, member: str) -> list[str]:
    """The residue strings of a GOR file: "!name length", then lines, "@" at the end."""
    found: list[list[str]] = []
    with open_member(archive, member) as stream:
        for line in stream:
            if line.startswith("!"):
                found.append([])
            else:
                found[-1].append(line.strip().rstrip("@"))
    return ["".join(lines) for lines in found]


def relatives(sequences: list[str], run: int = SHARED_RUN) -> list[int]:
    """A family's number for each sequence; a run of residues in common links two."""
    parent = list(range(len(sequences)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[str, int] = {}
    for index, sequence in enumerate(sequences):
        for start in range(len(sequence) - run + 1):
            other = first_with.setdefault(sequence[start : start + run], index)
            parent[root(index)] = root(other)
    return [root(index) for index in range(len(sequences))]


def read(archive: Path, data: Path) -> list[Subject]:
    """One subject a chain; its group are the chains with which it shares a run of residues, purification tags aside."""
    pairs = zip(_records(archive, SEQUENCES), _records(archive, STRUCTURES), strict=True)
    chains = {sequence: structure for sequence, structure in pairs if len(sequence) >= MIN_RESIDUES}
    sequences = list(chains)
    families = relatives([_without_tags(sequence) for sequence in sequences])
    known = _reserved(
        sequences,
        [
            question.removeprefix("Protein segment ").partition(":")[0].replace(" ", "")
            for question in held_out_questions(data, "protein")
        ],
    )
    return [
        Subject(
            key=sequence,
            group=str(family),
            text=sequence,
            values={
                "structure": chains[sequence],
                "helix": chains[sequence].count("H") / len(sequence),
                "sheet": chains[sequence].count("E") / len(sequence),
            },
            reserved=sequence in known,
        )
        for sequence, family in zip(sequences, families, strict=True)
    ]


def _without_tags(sequence: str) -> str:
    """The chain without runs of histidine and what is cloned beside them, which say nothing of kinship."""
    for tag in ("HHHHHH", "GSHM", "ENLYFQG", "LVPRGS"):
        sequence = sequence.replace(tag, "-" * len(tag))
    return sequence if "-" not in sequence else max(sequence.split("-"), key=len)


def _reserved(sequences: list[str], segments: list[str]) -> set[str]:
    """The chains that have one of the segments, all of which are of one length."""
    by_segment: defaultdict[str, list[str]] = defaultdict(list)
    size = len(segments[0]) if segments else 0
    wanted = set(segments)
    for sequence in sequences:
        for start in range(len(sequence) - size + 1 if size else 0):
            if sequence[start : start + size] in wanted:
                by_segment[sequence[start : start + size]].append(sequence)
    return {sequence for found in by_segment.values() for sequence in found}
