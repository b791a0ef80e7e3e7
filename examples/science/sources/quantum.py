"""Quantum chemistry: gap, dipole moment and polarizability of small molecules (QM9)."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from packages import Package, open_member

from examples.science.molecules import scaffold, skeleton_of_inchi
from examples.science.subject import Subject, held_out_questions

PACKAGE = Package(
    name="qm9pack",
    version="1.0.3",
    file="qm9pack-1.0.3-py3-none-any.whl",
    sha256="1d88c2988007c6778e717ee3224cf511bd60e10732ebe3b7ed500ea5af05c9f0",
    licence="MIT",
)
HARTREE_EV = 27.2114
FILES = tuple(f"qm9pack/data/qm9_part{part}.csv" for part in (1, 2, 3))


def _entries(archive: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # a field holds all coordinates of a molecule
    for member in FILES:
        with open_member(archive, member) as stream:
            yield from csv.DictReader(stream)


def read(archive: Path, data: Path) -> list[Subject]:
    """One subject a molecule; tautomers and stereoisomers that share a skeleton count as the first of them."""
    questions = held_out_questions(data, "quantum")
    reserved = {question.removeprefix("Molecule ").partition(":")[0] for question in questions}
    found: dict[str, Subject] = {}
    for entry in _entries(archive):
        key = skeleton_of_inchi(entry["InChi"])
        group = None if key in found else scaffold(entry["SMILES"], key)
        if group is None:
            if entry["SMILES"] in reserved and key in found and not found[key].reserved:
                found[key] = Subject(**{**vars(found[key]), "reserved": True})
            continue
        values = {
            "gap": float(entry["HOMO_LUMO_gap_au"]) * HARTREE_EV,  # eV
            "dipole": float(entry["Dipole_debye"]),  # D
            "polarizability": float(entry["Polarizability_bohr3"]),  # bohr^3
        }
        found[key] = Subject(
            key=key, group=group, text=entry["SMILES"], values=values, reserved=entry["SMILES"] in reserved
        )
    return list(found.values())
