"""Bioactive peptides: is a peptide antimicrobial, yes or no?"""

from collections import defaultdict
from pathlib import Path

from domain import Domain
from packages import Package, open_member
from rows import Row

MAX_RESIDUES = 40
SHARED_RUN = 8
ANSWERS = {"1": "yes", "0": "no"}
FILE = "modlamp/data/AMPvsUniProt.csv"


def families(sequences: list[str]) -> list[int]:
    """Return a family number for each sequence; a common run of SHARED_RUN residues links two sequences."""
    parent = list(range(len(sequences)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    first_with: dict[str, int] = {}
    for index, sequence in enumerate(sequences):
        for start in range(len(sequence) - SHARED_RUN + 1):
            other = first_with.setdefault(sequence[start : start + SHARED_RUN], index)
            parent[root(index)] = root(other)
    return [root(index) for index in range(len(sequences))]


def read(archive: Path, seed: int) -> list[Row]:
    """Return one row for each peptide of at most MAX_RESIDUES that is not in both classes."""
    answers: defaultdict[str, set[str]] = defaultdict(set)
    with open_member(archive, FILE) as stream:
        next(stream)  # a header: counts and class names
        for line in stream:
            sequence, label = line.split(",")
            # Whole chains from UniProt start with M, mature peptides don't: it would give them away.
            answers[sequence.strip().removeprefix("M")].add(ANSWERS[label.strip()])
    peptides = [key for key, found in answers.items() if len(found) == 1 and len(key) <= MAX_RESIDUES]
    question = "Peptide {}: is it antimicrobial, yes or no?"
    return [
        Row(question.format(" ".join(peptide)), min(answers[peptide]), group=str(family))
        for peptide, family in zip(peptides, families(peptides), strict=True)
    ]


PEPTIDES = Domain(
    name="peptides",
    title="Bioactive peptides: antimicrobial or not (APD3 and UniProt)",
    package=Package(
        name="modlamp",
        version="4.3.3",
        file="modlamp-4.3.3-py3-none-any.whl",
        sha256="6948bcbc4a9614d10b6b47a051d4576c42fe8e5487fbbeb3cfe0d8033eb27f91",
        licence="BSD-3-Clause",
    ),
    members=(FILE,),
    labels=("yes", "no"),
    read=read,
    num_train=2500,
    rules=(
        "Answers: yes for the 2,600 peptides of the Antimicrobial Peptide Database (APD3, January 2016), no "
        "for the 2,600 others, drawn from UniProt by the package's authors and not tested: a few may be "
        "antimicrobial.",
        "A leading M (the initiator methionine) is removed: 44 % of the short UniProt sequences start with "
        "it and under 1 % of the others, which would answer the question without any biology.",
        f"Only peptides of at most {MAX_RESIDUES} residues; duplicates count as one; peptides in both "
        "classes are left out.",
        f"Split by family: peptides linked by a common run of {SHARED_RUN} residues. Families of more than "
        "10 members are all in train, so that no family dominates a test set.",
        "Residues are separated by spaces.",
    ),
    citations=(
        "A. T. Mueller, G. Gabernet, J. A. Hiss, G. Schneider: modlAMP: Python for antimicrobial peptides. "
        "Bioinformatics 33, 2753 (2017), doi:10.1093/bioinformatics/btx285 (the package)",
        "G. Wang, X. Li, Z. Wang: APD3: the antimicrobial peptide database as a tool for research and "
        "education. Nucleic Acids Research 44, D1087 (2016), doi:10.1093/nar/gkv1278",
        "The UniProt Consortium: UniProt: a hub for protein information. Nucleic Acids Research 43, D204 "
        "(2015), doi:10.1093/nar/gku989",
    ),
    licence="UniProt's data are under CC BY 4.0; APD3 offers its sequences for download; cite it as above.",
)
