"""Formulas such as Ag2Ca1Ge2: reading, checking, composition."""

import math
import random
import re
from functools import cache

import numpy as np
from rdkit import Chem

_PART = re.compile(r"([A-Z][a-z]?)(\d*)")
_WHOLE = re.compile(r"(?:[A-Z][a-z]?\d*)+")
MAX_ATOMS = 1000  # of a formula


@cache
def atomic_numbers() -> dict[str, int]:
    """By symbol, the elements up to 103."""
    table = Chem.GetPeriodicTable()
    return {table.GetElementSymbol(number): number for number in range(1, 104)}


def parse(formula: str) -> dict[str, int] | None:
    """Atoms by element; None for what is no formula of known elements, each named once."""
    if not _WHOLE.fullmatch(formula):
        return None
    parts = _PART.findall(formula)
    counts = {element: int(count or 1) for element, count in parts}
    known = all(element in atomic_numbers() for element in counts)
    whole = len(counts) == len(parts) and min(counts.values()) > 0 and sum(counts.values()) <= MAX_ATOMS
    return counts if known and whole else None


def counts_of(formula: str) -> dict[str, int]:
    """Atoms by element. Raises ValueError."""
    counts = parse(formula)
    if counts is None:
        raise ValueError(f"{formula!r} is no formula. Write elements and whole counts, such as Al2O3.")
    return counts


def reduced(formula: str) -> str:
    """The composition with the smallest counts, elements by name: Al4O6 and O3Al2 are Al2 O3."""
    counts = counts_of(formula)
    divisor = math.gcd(*counts.values())
    return " ".join(f"{element}{count // divisor}" for element, count in sorted(counts.items()))


def chemical_system(formula: str) -> str:
    return "-".join(sorted(counts_of(formula)))


def reordered(formula: str, seed: int) -> str:
    """The same formula with its elements in another order."""
    parts = [f"{element}{count}" for element, count in counts_of(formula).items()]
    random.Random(seed).shuffle(parts)
    return "".join(parts)


def fractions(formula: str) -> np.ndarray:  # [103]
    """The share of each element's atoms."""
    counts = counts_of(formula)
    found = np.zeros(103, dtype=np.float32)
    for element, count in counts.items():
        found[atomic_numbers()[element] - 1] = count / sum(counts.values())
    return found


@cache
def _properties() -> np.ndarray:  # [103, properties]
    """Of each element: number, mass, radii, outer electrons, period, and place from the period's noble gas."""
    table, rows = Chem.GetPeriodicTable(), []
    nobles = (0, 2, 10, 18, 36, 54, 86, 118)
    for number in range(1, 104):
        period = next(i for i, last in enumerate(nobles) if number <= last)
        place = (number - nobles[period - 1], nobles[period] - number)
        radii = (table.GetRcovalent(number), table.GetRvdw(number), table.GetRb0(number))
        rows.append((number, table.GetAtomicWeight(number), *radii, table.GetNOuterElecs(number), period, *place))
    return np.array(rows, dtype=np.float32)


def element_statistics(formula: str) -> np.ndarray:  # [5 * properties]
    """Mean, deviation, least, greatest and range of the elements' properties, weighted by their shares."""
    share = fractions(formula)
    of_formula = _properties()[share > 0]
    weights = share[share > 0][:, None]
    mean = (weights * of_formula).sum(axis=0)
    deviation = np.sqrt((weights * (of_formula - mean) ** 2).sum(axis=0))
    least, greatest = of_formula.min(axis=0), of_formula.max(axis=0)
    return np.concatenate([mean, deviation, least, greatest, greatest - least])


def nearest_distance(formula: str, others: np.ndarray) -> float:  # others: [formulas, 103]
    """The smallest share of atoms in which the composition differs from one of the others."""
    return float(np.abs(others - fractions(formula)).sum(axis=1).min() / 2)
