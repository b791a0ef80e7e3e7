"""Quantum chemistry: is a small molecule's HOMO-LUMO gap low, medium or high?"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from domain import Domain
from packages import Package, open_member
from rows import Row, draw, level

HARTREE_EV = 27.2114
CUTS_EV = (6.16, 7.48)
NUM_CANDIDATES = 6000  # of some 127,000 molecules: more than the splits take
FILES = tuple(f"qm9pack/data/qm9_part{part}.csv" for part in (1, 2, 3))


def molecules(archive: Path) -> Iterator[dict[str, str]]:
    """Yield the table's lines, one molecule each."""
    csv.field_size_limit(sys.maxsize)  # a field holds all coordinates of a molecule
    for member in FILES:
        with open_member(archive, member) as stream:
            yield from csv.DictReader(stream)


def read(archive: Path, seed: int) -> list[Row]:
    """Return one row for each of NUM_CANDIDATES molecules; tautomers that share an InChI count as one."""
    first: dict[str, Row] = {}
    for molecule in molecules(archive):
        gap = level(float(molecule["HOMO_LUMO_gap_au"]) * HARTREE_EV, *CUTS_EV)
        question = f"Molecule {molecule['SMILES']}: is its HOMO-LUMO gap low, medium or high?"
        first.setdefault(molecule["InChi"], Row(question, gap, molecule["InChi"]))
    return [first[inchi] for inchi in sorted(first, key=lambda name: draw(seed, name))[:NUM_CANDIDATES]]


QUANTUM = Domain(
    name="quantum",
    title="Quantum chemistry: HOMO-LUMO gaps of small molecules (QM9)",
    package=Package(
        name="qm9pack",
        version="1.0.3",
        file="qm9pack-1.0.3-py3-none-any.whl",
        sha256="1d88c2988007c6778e717ee3224cf511bd60e10732ebe3b7ed500ea5af05c9f0",
        licence="MIT",
    ),
    members=FILES,
    labels=("low", "medium", "high"),
    read=read,
    num_train=3000,
    rules=(
        f"Answers: the gap `HOMO_LUMO_gap_au` x {HARTREE_EV} eV; low < {CUTS_EV[0]} <= medium < {CUTS_EV[1]} "
        "<= high, about the terciles of the whole table (130,831 molecules, B3LYP/6-31G(2df,p)).",
        "Molecules that share an InChI (tautomers) count as one: the first is kept, 126,940 remain.",
        "A random sample of them, split by InChI, so that no molecule is in two splits.",
    ),
    citations=(
        "R. Ramakrishnan, P. O. Dral, M. Rupp, O. A. von Lilienfeld: Quantum chemistry structures and "
        "properties of 134 kilo molecules. Scientific Data 1, 140022 (2014), doi:10.1038/sdata.2014.22",
        "L. Ruddigkeit, R. van Deursen, L. C. Blum, J.-L. Reymond: Enumeration of 166 billion organic small "
        "molecules in the chemical universe database GDB-17. J. Chem. Inf. Model. 52, 2864 (2012), "
        "doi:10.1021/ci300415d",
    ),
    licence="The original data are open, published with the paper on figshare.",
)
