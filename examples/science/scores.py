"""Scores with standard errors: numbers by R2 and MAE, words by the share that is right, labels by residue."""

import math
from collections.abc import Sequence

import numpy as np
from mixture_table import standard_error

RESAMPLED = 500  # bootstrap samples of the questions
Score = dict[str, float]


def number_scores(guesses: Sequence[float | None], truths: Sequence[float], *, logarithms: bool = False) -> Score:
    """R2 and mean absolute error of numeric answers; one that is no number counts as the mean of the truths.

    With `logarithms` (of moduli) also both of the base-10 logarithms, in which benchmarks are given.
    """
    truth = np.array(truths, dtype=np.float64)
    guess = np.array([truth.mean() if each is None else each for each in guesses], dtype=np.float64)
    errors = np.abs(guess - truth)
    found = {
        "num_questions": len(truth),
        "numbers": round(1 - sum(each is None for each in guesses) / len(truth), 4),
        "r2": round(_r2(guess, truth), 4),
        "r2_error": round(_bootstrapped(guess, truth), 4),
        "mae": _digits(errors.mean()),
        "mae_error": _digits(errors.std() / math.sqrt(len(truth))),
    }
    if logarithms:
        logs = np.log10(np.maximum(guess, 0.5)), np.log10(np.maximum(truth, 0.5))
        found |= {"r2_log10": round(_r2(*logs), 4), "mae_log10": _digits(np.abs(logs[0] - logs[1]).mean())}
    return found


def word_scores(guesses: Sequence[str], truths: Sequence[str]) -> Score:
    """The share of exact words; `right` has one digit a question, for paired errors."""
    right = "".join(str(int(guess == truth)) for guess, truth in zip(guesses, truths, strict=True))
    share = right.count("1") / len(right)
    return {"num_questions": len(right), "share": round(share, 4), "share_error": round(standard_error(right), 4)}


def label_scores(guesses: Sequence[str], truths: Sequence[str]) -> Score:
    """Q3: the share of residues whose state is right; a missing one is wrong. The error is over sequences."""
    shares = [
        sum(a == b for a, b in zip(guess, truth, strict=False)) / len(truth)
        for guess, truth in zip(guesses, truths, strict=True)
    ]
    residues = sum(map(len, truths))
    q3 = sum(share * len(truth) for share, truth in zip(shares, truths, strict=True)) / residues
    error = float(np.std(shares)) / math.sqrt(len(shares))
    return {"num_questions": len(truths), "q3": round(q3, 4), "q3_error": round(error, 4)}


def _r2(guess: np.ndarray, truth: np.ndarray) -> float:
    spread = float(((truth - truth.mean()) ** 2).sum())
    return 1 - float(((guess - truth) ** 2).sum()) / spread if spread > 1e-12 else 0.0


def _bootstrapped(guess: np.ndarray, truth: np.ndarray) -> float:
    draw = np.random.default_rng(0)
    picks = draw.integers(0, len(truth), (RESAMPLED, len(truth)))
    return float(np.std([_r2(guess[pick], truth[pick]) for pick in picks]))


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
