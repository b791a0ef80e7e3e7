"""Materials mechanics: bulk and shear moduli of crystals (Materials Project, as in matbench)."""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

from packages import Package, open_member

from examples.science.formulas import chemical_system, reduced
from examples.science.subject import Subject, held_out_questions

PACKAGE = Package(
    name="crabnet",
    version="2.0.8",
    file="crabnet-2.0.8-py3-none-any.whl",
    sha256="4901565abaa5b4cd1a7841b9de647a3906df21676b226a7abf972d113f92054a",
    licence="MIT",
)
FILES = {
    "bulk": "crabnet/data/matbench/elasticity_log10(K_VRH).csv",
    "shear": "crabnet/data/matbench/elasticity_log10(G_VRH).csv",
}


def read(archive: Path, data: Path) -> list[Subject]:
    """One subject a reduced composition, with the median of its polymorphs' moduli in GPa."""
    questions = held_out_questions(data, "materials")
    reserved = {chemical_system(question.removeprefix("Material ").partition(":")[0]) for question in questions}
    formulas: dict[str, str] = {}
    logs: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for modulus, file in FILES.items():
        with open_member(archive, file) as stream:
            for entry in csv.DictReader(stream):
                key = reduced(entry["formula"])
                formulas.setdefault(key, entry["formula"])
                logs[key][modulus].append(float(entry["target"]))
    subjects = []
    for key, formula in formulas.items():
        values = {modulus: 10 ** statistics.median(found) for modulus, found in logs[key].items()}
        group = chemical_system(formula)
        subjects.append(Subject(key=key, group=group, text=formula, values=values, reserved=group in reserved))
    return subjects
