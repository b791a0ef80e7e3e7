"""Chemistry: melting points of organic compounds (Bradley's open melting point data)."""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

from packages import Package, open_member

from examples.science.molecules import SKELETON, scaffold
from examples.science.subject import Subject, held_out_questions

PACKAGE = Package(
    name="chemicals",
    version="1.5.2",
    file="chemicals-1.5.2-py3-none-any.whl",
    sha256="f85ef7f36e77fee634686c26562929ee61026cd548d89cebd57b2251ca843d6e",
    licence="MIT",
)
MELTING_POINTS = "chemicals/Phase Change/OpenNotebook Melting Points.tsv"
IDENTIFIERS = (
    "chemicals/Identifiers/chemical identifiers pubchem large.tsv",
    "chemicals/Identifiers/chemical identifiers pubchem small.tsv",
)
CAS, SMILES, INCHI_KEY, IUPAC_NAME = 1, 4, 6, 7  # columns of the identifier tables
MAX_TEXT = 90  # characters of a SMILES or a name


def read(archive: Path, data: Path) -> list[Subject]:
    """One subject a molecule without stereochemistry, with the median of its melting points in kelvin."""
    with open_member(archive, MELTING_POINTS) as stream:
        points = {entry["CAS"]: float(entry["Tm"]) for entry in csv.DictReader(stream, delimiter="\t")}
    texts: dict[str, tuple[str, str]] = {}
    found: defaultdict[str, list[float]] = defaultdict(list)
    for member in IDENTIFIERS:
        with open_member(archive, member) as stream:
            for line in stream:
                columns = line.rstrip("\r\n").split("\t")
                smiles, name = columns[SMILES], columns[IUPAC_NAME]
                if columns[CAS] in points and 0 < len(smiles) <= MAX_TEXT and 0 < len(name) <= MAX_TEXT:
                    key = columns[INCHI_KEY][:SKELETON]
                    texts.setdefault(key, (smiles, name))
                    found[key].append(points[columns[CAS]])
    questions = held_out_questions(data, "chemistry")
    reserved = {question.removeprefix("Compound ").rpartition(":")[0] for question in questions}
    subjects = []
    for key, (smiles, name) in texts.items():
        group = scaffold(smiles, key)
        if group is not None:
            values = {"melting": statistics.median(found[key])}
            known = name in reserved
            subjects.append(Subject(key=key, group=group, text=smiles, name=name, values=values, reserved=known))
    return subjects
