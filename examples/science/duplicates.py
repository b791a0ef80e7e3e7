"""How much of the test sets is nearly in train, although no group is in both: counted and written, not removed."""

import random
from collections.abc import Mapping, Sequence

import numpy as np

from examples.science.formulas import fractions, nearest_distance
from examples.science.molecules import nearest_similarities
from examples.science.subject import Subject

PROBED = 400  # test subjects that are compared
MAX_TRAIN = 20_000  # molecules of train that they are compared with
SIMILAR = 0.9  # Tanimoto similarity of Morgan fingerprints
CLOSE = 0.1  # share of atoms in which two compositions differ
RUN = 6  # residues
RUNS_IN_COMMON = 0.3  # share of a sequence's runs that are in one other


def near_duplicates(domain: str, splits: Mapping[str, Sequence[Subject]], seed: int) -> dict[str, float | str]:
    """The share of test subjects with a near-duplicate in train, and what counts as one."""
    test = [subject.text for subject in splits["test"]][:PROBED]
    train = [subject.text for subject in splits["train"]]
    if domain == "materials":
        others = np.stack([fractions(formula) for formula in train])
        near = [nearest_distance(formula, others) <= CLOSE for formula in test]
        rule = f"compositions that differ in at most {CLOSE:.0%} of their atoms"
    elif domain in ("protein", "peptides"):
        near = _with_runs_in_common(test, train)
        rule = f"at least {RUNS_IN_COMMON:.0%} of the runs of {RUN} residues are in one sequence of train"
    else:
        some = random.Random(seed).sample(train, min(MAX_TRAIN, len(train)))
        near = [similarity >= SIMILAR for similarity in nearest_similarities(test, some)]
        rule = f"Tanimoto similarity of Morgan fingerprints of at least {SIMILAR}, among {len(some):,} of train"
    return {"rule": rule, "probed": len(test), "share": round(sum(near) / max(1, len(near)), 4)}


def _with_runs_in_common(some: Sequence[str], others: Sequence[str]) -> list[bool]:
    homes: dict[str, set[int]] = {}
    for index, sequence in enumerate(others):
        for run in _runs(sequence):
            homes.setdefault(run, set()).add(index)
    found = []
    for sequence in some:
        runs = _runs(sequence)
        counts: dict[int, int] = {}
        for run in runs:
            for index in homes.get(run, ()):
                counts[index] = counts.get(index, 0) + 1
        found.append(bool(runs) and max(counts.values(), default=0) >= RUNS_IN_COMMON * len(runs))
    return found


def _runs(sequence: str) -> set[str]:
    return {sequence[start : start + RUN] for start in range(len(sequence) - RUN + 1)}
