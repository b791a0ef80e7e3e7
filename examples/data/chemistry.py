"""Chemistry: is a compound's melting point low, medium or high?"""

import csv
from collections import defaultdict
from pathlib import Path

from domain import Domain
from packages import Package, open_member
from rows import Row, level

CUTS_K = (310, 386)
MAX_NAME = 80  # characters
MELTING_POINTS = "chemicals/Phase Change/OpenNotebook Melting Points.tsv"
IDENTIFIERS = (
    "chemicals/Identifiers/chemical identifiers pubchem large.tsv",
    "chemicals/Identifiers/chemical identifiers pubchem small.tsv",
)
CAS, INCHI_KEY, IUPAC_NAME = 1, 6, 7  # columns of the identifier tables
SKELETON = 14  # characters of an InChIKey that encode the molecule without its stereochemistry


def melting_points(archive: Path) -> dict[str, float]:
    """Return the melting point in kelvin for each CAS number."""
    with open_member(archive, MELTING_POINTS) as stream:
        return {entry["CAS"]: float(entry["Tm"]) for entry in csv.DictReader(stream, delimiter="\t")}


def read(archive: Path, seed: int) -> list[Row]:
    """Return one row for each named molecule whose stereoisomers agree on the answer."""
    points = melting_points(archive)
    names: dict[str, str] = {}
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for member in IDENTIFIERS:
        with open_member(archive, member) as stream:
            for line in stream:
                columns = line.rstrip("\r\n").split("\t")
                name = columns[IUPAC_NAME]
                if columns[CAS] in points and 0 < len(name) <= MAX_NAME:
                    skeleton = columns[INCHI_KEY][:SKELETON]
                    names.setdefault(skeleton, name)
                    answers[skeleton].add(level(points[columns[CAS]], *CUTS_K))
    return [
        Row(f"Compound {name}: is its melting point low, medium or high?", min(answers[skeleton]), skeleton)
        for skeleton, name in names.items()
        if len(answers[skeleton]) == 1
    ]


CHEMISTRY = Domain(
    name="chemistry",
    title="Chemistry: melting points of organic compounds (Bradley's open melting point data)",
    package=Package(
        name="chemicals",
        version="1.5.2",
        file="chemicals-1.5.2-py3-none-any.whl",
        sha256="f85ef7f36e77fee634686c26562929ee61026cd548d89cebd57b2251ca843d6e",
        licence="MIT",
    ),
    members=(MELTING_POINTS, *IDENTIFIERS),
    labels=("low", "medium", "high"),
    read=read,
    num_train=3000,
    rules=(
        f"Answers: the melting point `Tm`; low < {CUTS_K[0]} K <= medium < {CUTS_K[1]} K <= high, about the "
        "terciles of the 11,384 compounds with an identifier.",
        "Joined by CAS number with PubChem's IUPAC name (lower case, as in the package); names of more than "
        f"{MAX_NAME} characters and compounds without one are left out.",
        f"Compounds that share the first {SKELETON} characters of the InChIKey (stereoisomers) count as one: "
        "the first name is kept; those with different answers are left out.",
        "Split by that part of the InChIKey, so that no molecule is in two splits.",
    ),
    citations=(
        "J.-C. Bradley, A. Williams, A. Lang: Jean-Claude Bradley Open Melting Point Dataset. figshare "
        "(2014), doi:10.6084/m9.figshare.1031637",
        "C. Bell et al.: chemicals: chemical properties component of Chemical Engineering Design Library "
        "(ChEDL), https://github.com/CalebBell/chemicals (the package)",
        "S. Kim et al.: PubChem substance and compound databases. Nucleic Acids Research 44, D1202 (2016), "
        "doi:10.1093/nar/gkv951 (the names)",
    ),
    licence="The melting points were published as Open Data.",
)
