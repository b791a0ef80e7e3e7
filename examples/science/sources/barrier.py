"""Drug chemistry: does a molecule cross the blood-brain barrier (B3DB)?

Half of the table's 7,807 rows are stereoisomers of others: without stereochemistry there are 4,023 molecules, and those
whose isomers have different labels are left out.
"""

import csv
from collections import defaultdict
from pathlib import Path

from packages import Package, open_member

from examples.science.molecules import scaffold, skeleton_of_inchi
from examples.science.subject import Subject

PACKAGE = Package(
    name="qc-b3db",
    version="1.1.1",
    file="qc_b3db-1.1.1-py3-none-any.whl",
    sha256="c929f601951e4b0ed56326c94d2cdc2f6b0c24711fbc1e0d7f67e88e330fc959",
    licence="CC0-1.0",
)
FILE = "B3DB/B3DB_classification.tsv"
LABELS = {"BBB+": "yes", "BBB-": "no"}
MAX_SMILES = 150  # characters


def read(archive: Path, data: Path) -> list[Subject]:
    """One subject a molecule without stereochemistry whose labels agree."""
    labels: defaultdict[str, set[str]] = defaultdict(set)
    texts: dict[str, str] = {}
    with open_member(archive, FILE) as stream:
        for entry in csv.DictReader(stream, delimiter="\t"):
            if len(entry["SMILES"]) <= MAX_SMILES and entry["Inchi"]:
                key = skeleton_of_inchi(entry["Inchi"])
                texts.setdefault(key, entry["SMILES"])
                labels[key].add(LABELS[entry["BBB+/BBB-"]])
    subjects = []
    for key, smiles in texts.items():
        group = scaffold(smiles, key)
        if group is not None and len(labels[key]) == 1:
            subjects.append(Subject(key=key, group=group, text=smiles, values={"crosses": min(labels[key])}))
    return subjects
