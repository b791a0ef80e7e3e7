"""The questions that are asked of a subject: numbers, words, labels of residues, and designs for a wanted value.

Numbers and designs are written as X-LoRA's authors write them (arXiv 2402.07148): CalculateGap<SMILES> [6.82].
SmolLM2's tokenizer gives every digit, point and bracket a token of its own: numbers are learnt digit by digit.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rows import level

from examples.science.formulas import reordered
from examples.science.molecules import rewritten
from examples.science.subject import Subject

SEGMENT = 21  # residues of a window that is one word's
AGREEING = 14  # of them in one state
STRETCH = 40  # residues whose states are asked for one by one
MAX_CHAIN = 200  # residues of a chain whose fractions are asked for
STATES = {"H": "helix", "E": "sheet", "C": "coil"}
_NUMBER = re.compile(r"\[?\s*(-?\d+(?:\.\d+)?)")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question, its answer, and what the answer stands for."""

    prompt: str
    answer: str
    key: str
    value: float | str  # the number before rounding, the word, the labels, or the wanted value of a design
    text: str  # what is asked about, for baselines: SMILES, formula or residues


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of question about a domain's subjects."""

    name: str
    domain: str
    kind: str  # number, word, labels or design
    ask: Callable[[Subject, random.Random], Asked | None]  # None: not of this subject
    unit: str = ""
    labels: tuple[str, ...] = ()  # of words


def parse_number(text: str) -> float | None:
    """The number that an answer begins with, "[6.82]" or "6.82"; None if it begins with something else."""
    found = _NUMBER.match(text.strip())
    return float(found[1]) if found else None


def parse_design(text: str) -> str | None:
    """What stands between an answer's brackets, or None."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 2 and text[0] == "[" and text[-1] == "]" else None


def spaced(residues: str) -> str:
    """One token a residue."""
    return " ".join(residues)


def written(subject: Subject, domain: str, draw: random.Random) -> str:
    """The subject's text in another of the forms that mean the same: another first atom, another order of elements."""
    if domain == "materials":
        return reordered(subject.text, draw.randrange(2**32))
    if domain in ("quantum", "chemistry", "barrier"):
        return rewritten(subject.text, draw.randrange(2**32))
    return subject.text


def _asked(subject: Subject, prompt: str, answer: str, value: float | str, text: str | None = None) -> Asked:
    return Asked(prompt=prompt, answer=answer, key=subject.key, value=value, text=text or subject.text)


def _number(name: str, domain: str, of: str, decimals: int, unit: str) -> Task:
    def ask(subject: Subject, draw: random.Random) -> Asked | None:
        if of not in subject.values:
            return None
        value = float(subject.values[of])
        return _asked(subject, f"{name}<{subject.text}>", f"[{value:.{decimals}f}]", value)

    return Task(name=of, domain=domain, kind="number", ask=ask, unit=unit)


def _fraction(name: str, of: str) -> Task:
    def ask(subject: Subject, draw: random.Random) -> Asked | None:
        if len(subject.text) > MAX_CHAIN:
            return None
        value = float(subject.values[of])
        return _asked(subject, f"{name}<{spaced(subject.text)}>", f"[{value:.2f}]", value)

    return Task(name=of, domain="protein", kind="number", ask=ask)


def _level(name: str, domain: str, of: str, cuts: tuple[float, float], wording: str) -> Task:
    def ask(subject: Subject, draw: random.Random) -> Asked | None:
        if of not in subject.values:
            return None
        word = level(float(subject.values[of]), *cuts)
        prompt = wording.replace("{name}", subject.name).replace("{text}", subject.text)
        return _asked(subject, prompt, word, word)

    return Task(name=name, domain=domain, kind="word", ask=ask, labels=("low", "medium", "high"))


def _yes_or_no(name: str, domain: str, of: str, wording: str, spread: bool = False) -> Task:
    def ask(subject: Subject, draw: random.Random) -> Asked | None:
        word = str(subject.values[of])
        text = spaced(subject.text) if spread else subject.text
        return _asked(subject, wording.replace("{text}", text), word, word)

    return Task(name=name, domain=domain, kind="word", ask=ask, labels=("yes", "no"))


def _segment(subject: Subject, draw: random.Random) -> Asked | None:
    """A state among those that the chain offers, then a window of it: uniform sampling would give few sheets."""
    structure = str(subject.values["structure"])
    offered: dict[str, list[int]] = {state: [] for state in STATES}
    for start in range(len(structure) - SEGMENT + 1):
        window = structure[start : start + SEGMENT]
        for state in STATES:
            if window.count(state) >= AGREEING:
                offered[state].append(start)
    states = [state for state, starts in offered.items() if starts]
    if not states:
        return None
    state = draw.choice(states)
    start = draw.choice(offered[state])
    residues = subject.text[start : start + SEGMENT]
    prompt = f"Protein segment {spaced(residues)}: helix, sheet or coil?"
    return _asked(subject, prompt, STATES[state], STATES[state], residues)


def _structure(subject: Subject, draw: random.Random) -> Asked | None:
    start = draw.randrange(max(1, len(subject.text) - STRETCH + 1))
    residues = subject.text[start : start + STRETCH]
    states = str(subject.values["structure"])[start : start + STRETCH]
    return _asked(subject, f"CalculateStructure<{spaced(residues)}>", f"[{spaced(states)}]", states, residues)


def _molecule(subject: Subject, draw: random.Random) -> Asked | None:
    wanted = round(float(subject.values["gap"]), 1)
    return _asked(subject, f"GenerateMolecule<{wanted:.1f}>", f"[{subject.text}]", wanted)


def _formula(subject: Subject, draw: random.Random) -> Asked | None:
    if "bulk" not in subject.values:
        return None
    wanted = round(float(subject.values["bulk"]))
    return _asked(subject, f"GenerateFormula<{wanted}>", f"[{subject.text}]", wanted)


def _peptide(subject: Subject, draw: random.Random) -> Asked | None:
    """Of a class, a net charge and a length, so that a guess rarely hits."""
    kind = "antimicrobial" if subject.values["antimicrobial"] == "yes" else "other"
    wanted = f"{kind}, {int(subject.values['charge']):+d}, {len(subject.text)}"
    return _asked(subject, f"GeneratePeptide<{wanted}>", f"[{spaced(subject.text)}]", wanted)


_ALL = (
    _number("CalculateGap", "quantum", "gap", 2, "eV"),
    _number("CalculateDipole", "quantum", "dipole", 2, "D"),
    _number("CalculatePolarizability", "quantum", "polarizability", 1, "bohr^3"),
    _level("gap_level", "quantum", "gap", (6.16, 7.48), "Molecule {text}: is its HOMO-LUMO gap low, medium or high?"),
    Task(name="molecule", domain="quantum", kind="design", ask=_molecule, unit="eV"),
    _number("CalculateBulkModulus", "materials", "bulk", 0, "GPa"),
    _number("CalculateShearModulus", "materials", "shear", 0, "GPa"),
    _level("bulk_level", "materials", "bulk", (59, 124), "Material {text}: is its bulk modulus low, medium or high?"),
    Task(name="formula", domain="materials", kind="design", ask=_formula, unit="GPa"),
    _fraction("CalculateHelixFraction", "helix"),
    _fraction("CalculateSheetFraction", "sheet"),
    Task(name="segment", domain="protein", kind="word", ask=_segment, labels=tuple(STATES.values())),
    Task(name="structure", domain="protein", kind="labels", ask=_structure),
    _yes_or_no("antimicrobial", "peptides", "antimicrobial", "Peptide {text}: is it antimicrobial, yes or no?", True),
    Task(name="peptide", domain="peptides", kind="design", ask=_peptide),
    _number("CalculateMeltingPoint", "chemistry", "melting", 0, "K"),
    _level(
        "melting_level",
        "chemistry",
        "melting",
        (310, 386),
        "Compound {name}: is its melting point low, medium or high?",
    ),
    _yes_or_no("crosses", "barrier", "crosses", "Molecule {text}: does it cross the blood-brain barrier, yes or no?"),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}


def tasks_of(domain: str) -> list[Task]:
    return [task for task in _ALL if task.domain == domain]
