"""Materials mechanics: is a crystal's bulk modulus low, medium or high?"""

import csv
import math
import re
from collections import defaultdict
from pathlib import Path

from domain import Domain
from packages import Package, open_member
from rows import Row, level

CUTS_GPA = (59, 124)
FILE = "crabnet/data/matbench/elasticity_log10(K_VRH).csv"


def composition(formula: str) -> tuple[tuple[str, int], ...]:
    """Return the reduced composition of a formula: "Al4O6" -> (("Al", 2), ("O", 3))."""
    counts = {element: int(count) for element, count in re.findall(r"([A-Z][a-z]?)(\d+)", formula)}
    divisor = math.gcd(*counts.values())
    return tuple(sorted((element, count // divisor) for element, count in counts.items()))


def read(archive: Path, seed: int) -> list[Row]:
    """Return one row for each composition whose polymorphs agree on the answer."""
    formulas: dict[tuple[tuple[str, int], ...], str] = {}
    answers: defaultdict[tuple[tuple[str, int], ...], set[str]] = defaultdict(set)
    with open_member(archive, FILE) as stream:
        for entry in csv.DictReader(stream):
            key = composition(entry["formula"])
            formulas.setdefault(key, entry["formula"])
            answers[key].add(level(10 ** float(entry["target"]), *CUTS_GPA))
    rows = []
    for key, formula in formulas.items():
        if len(answers[key]) == 1:
            (answer,) = answers[key]
            question = f"Material {formula}: is its bulk modulus low, medium or high?"
            rows.append(Row(question, answer, group="-".join(element for element, _ in key)))
    return rows


MATERIALS = Domain(
    name="materials",
    title="Materials mechanics: bulk moduli of crystals (Materials Project, matbench)",
    package=Package(
        name="crabnet",
        version="2.0.8",
        file="crabnet-2.0.8-py3-none-any.whl",
        sha256="4901565abaa5b4cd1a7841b9de647a3906df21676b226a7abf972d113f92054a",
        licence="MIT",
    ),
    members=(FILE,),
    labels=("low", "medium", "high"),
    read=read,
    num_train=3000,
    rules=(
        "Answers: the Voigt-Reuss-Hill bulk modulus from density functional theory, 10^target GPa; "
        f"low < {CUTS_GPA[0]} <= medium < {CUTS_GPA[1]} <= high, about the terciles of the whole table "
        "(10,987 entries).",
        "Entries of one reduced composition count as one: the first formula is kept; compositions whose "
        "polymorphs have different answers are left out.",
        "Split by chemical system (the set of elements): Al2O3 and AlO are never in two splits.",
    ),
    citations=(
        "M. de Jong et al.: Charting the complete elastic properties of inorganic crystalline compounds. "
        "Scientific Data 2, 150009 (2015), doi:10.1038/sdata.2015.9",
        "A. Dunn, Q. Wang, A. Ganose, D. Dopp, A. Jain: Benchmarking materials property prediction methods: "
        "the Matbench test set and Automatminer reference algorithm. npj Computational Materials 6, 138 "
        "(2020), doi:10.1038/s41524-020-00406-3 (task matbench_log_kvrh)",
        "A. Y.-T. Wang, S. K. Kauwe, R. J. Murdock, T. D. Sparks: Compositionally restricted attention-based "
        "network for materials property predictions. npj Computational Materials 7, 77 (2021), "
        "doi:10.1038/s41524-021-00545-1 (the package)",
    ),
    licence="The Materials Project's data are under CC BY 4.0.",
)
