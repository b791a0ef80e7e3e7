"""Designs judged: do they parse, are they new, and would they have the wanted value?

A design that is in the domain's table is judged by the table, any other by a gradient boosting model that the expert
has never met and whose own test score the table shows. The bar is what drawing from the training set at random hits.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import lightgbm
import numpy as np

from examples.science import formulas, molecules
from examples.science.baselines import judge_path
from examples.science.features import RESIDUES, field_features
from examples.science.make import all_splits
from examples.science.settings import Settings
from examples.science.sources.peptides import net_charge
from examples.science.subject import Subject
from examples.science.tasks import TASKS, Asked, parse_design

GAP_TOLERANCE_EV = 0.25
BULK_TOLERANCE = 0.1  # of the wanted modulus
CHARGE_TOLERANCE, LENGTH_TOLERANCE = 1, 2
LENGTHS = range(5, 51)  # residues of a valid peptide


@dataclass(frozen=True, kw_only=True)
class Designs:
    """One kind of design: how it is read, and when it hits."""

    identity: Callable[[str], str | None]  # None: not valid
    hits: Callable[[float | str, float | str], bool]  # (wanted, value)


def _peptide(text: str) -> str | None:
    residues = text.replace(" ", "")
    return residues if residues and set(residues) <= set(RESIDUES) and len(residues) in LENGTHS else None


def _formula(text: str) -> str | None:
    return formulas.reduced(text) if formulas.parse(text) is not None else None


def _near_gap(wanted: float | str, value: float | str) -> bool:
    return abs(float(value) - float(wanted)) <= GAP_TOLERANCE_EV


def _near_bulk(wanted: float | str, value: float | str) -> bool:
    return abs(float(value) - float(wanted)) <= BULK_TOLERANCE * float(wanted)


def _near_peptide(wanted: float | str, value: float | str) -> bool:
    """Class, charge and length, each as in "antimicrobial, +5, 24"."""
    want, have = ([part.strip() for part in str(each).split(",")] for each in (wanted, value))
    near_charge = abs(int(want[1]) - int(have[1])) <= CHARGE_TOLERANCE
    return want[0] == have[0] and near_charge and abs(int(want[2]) - int(have[2])) <= LENGTH_TOLERANCE


KINDS: Mapping[str, Designs] = {
    "molecule": Designs(identity=molecules.canonical, hits=_near_gap),
    "formula": Designs(identity=_formula, hits=_near_bulk),
    "peptide": Designs(identity=_peptide, hits=_near_peptide),
}


def _true_value(name: str, subject: Subject) -> float | str:
    asked = TASKS[name].ask(subject, random.Random(0))
    assert asked is not None, f"{subject.key} has no value for {name}"
    return asked.value


def design_scores(settings: Settings, name: str, asked: Sequence[Asked], answers: Sequence[str]) -> dict[str, float]:
    """Shares of valid, new, different and hitting designs, with the standard error of hits and the bar."""
    domain, kind = TASKS[name].domain, KINDS[name]
    splits, subjects, _ = all_splits(settings)
    table = {kind.identity(each.text): _true_value(name, each) for each in subjects[domain] if _has(name, each)}
    train = {kind.identity(each.text) for each in splits[domain]["train"]}
    texts = [parse_design(answer) or "" for answer in answers]
    found = [kind.identity(text) for text in texts]
    unknown = sorted({each for each in found if each is not None and each not in table})
    values = table | dict(zip(unknown, _judged(settings, name, unknown, domain), strict=True))
    hits = [each is not None and kind.hits(want.value, values[each]) for want, each in zip(asked, found, strict=True)]
    share = float(np.mean(hits))
    return {
        "num_questions": len(asked),
        "valid": round(float(np.mean([each is not None for each in found])), 4),
        "new": round(float(np.mean([each is not None and each not in train for each in found])), 4),
        "different": round(len({each for each in found if each is not None}) / len(found), 4),
        "in_table": round(float(np.mean([each in table for each in found])), 4),
        "hits": round(share, 4),
        "hits_error": round((share * (1 - share) / len(hits)) ** 0.5, 4),
        "hits_by_chance": round(_by_chance(settings, name, asked, splits[domain]["train"]), 4),
    }


def _has(name: str, subject: Subject) -> bool:
    return TASKS[name].ask(subject, random.Random(0)) is not None


def _judged(settings: Settings, name: str, designs: Sequence[str], domain: str) -> list[float | str]:
    """The judge's value of designs that the table doesn't have."""
    if not designs:
        return []
    booster = lightgbm.Booster(model_file=str(judge_path(settings, name)))
    texts = [design.replace(" ", "") for design in designs]
    guesses = np.asarray(booster.predict(field_features(domain, texts), num_threads=settings.baselines.threads))
    if name != "peptide":
        return [float(guess) for guess in guesses]
    labels = TASKS["antimicrobial"].labels
    words = ["antimicrobial" if labels[code] == "yes" else "other" for code in guesses.argmax(axis=1)]
    pairs = zip(words, texts, strict=True)
    return [f"{word}, {net_charge(peptide):+d}, {len(peptide)}" for word, peptide in pairs]


def _by_chance(settings: Settings, name: str, asked: Sequence[Asked], train: Sequence[Subject]) -> float:
    """How often a subject of train, drawn at random, hits."""
    draw = random.Random(settings.seed)
    values = [_true_value(name, each) for each in draw.sample(list(train), min(2000, len(train))) if _has(name, each)]
    hits = [
        KINDS[name].hits(want.value, value) for want in asked for value in draw.sample(values, min(100, len(values)))
    ]
    return float(np.mean(hits))
