"""Bioactive peptides: antimicrobial or not (APD3 and UniProt, by modlAMP)."""

from collections import defaultdict
from pathlib import Path

from packages import Package, open_member

from examples.science.sources.protein import relatives
from examples.science.subject import Subject, held_out_questions

PACKAGE = Package(
    name="modlamp",
    version="4.3.3",
    file="modlamp-4.3.3-py3-none-any.whl",
    sha256="6948bcbc4a9614d10b6b47a051d4576c42fe8e5487fbbeb3cfe0d8033eb27f91",
    licence="BSD-3-Clause",
)
FILE = "modlamp/data/AMPvsUniProt.csv"
MAX_RESIDUES = 40
SHARED_RUN = 8
LABELS = {"1": "yes", "0": "no"}
CHARGES = {"K": 1, "R": 1, "D": -1, "E": -1}


def net_charge(peptide: str) -> int:
    """Lysine and arginine minus aspartic and glutamic acid; ends and histidine are left out."""
    return sum(CHARGES.get(residue, 0) for residue in peptide)


def read(archive: Path, data: Path) -> list[Subject]:
    """One subject a peptide of at most 40 residues that is in one class only."""
    labels: defaultdict[str, set[str]] = defaultdict(set)
    with open_member(archive, FILE) as stream:
        next(stream)  # a header: counts and class names
        for line in stream:
            sequence, label = line.split(",")
            # Whole chains from UniProt start with M, mature peptides don't: it would give them away.
            labels[sequence.strip().removeprefix("M")].add(LABELS[label.strip()])
    peptides = [peptide for peptide, found in labels.items() if len(found) == 1 and 1 < len(peptide) <= MAX_RESIDUES]
    questions = held_out_questions(data, "peptides")
    reserved = {question.removeprefix("Peptide ").partition(":")[0].replace(" ", "") for question in questions}
    families = relatives(peptides, SHARED_RUN)
    closed = {family for peptide, family in zip(peptides, families, strict=True) if peptide in reserved}
    return [
        Subject(
            key=peptide,
            group=str(family),
            text=peptide,
            values={"antimicrobial": min(labels[peptide]), "charge": net_charge(peptide)},
            reserved=family in closed,
        )
        for peptide, family in zip(peptides, families, strict=True)
    ]
