"""Models from libraries on the same subjects as the experts: ridge or logistic regression, and gradient boosting.

Each is fitted on train (at most `baselines.max_rows` questions), regularised by valid, and measured once on the test
questions that the experts are asked. The boosting models of gap, bulk modulus and activity judge designs, so they are
kept.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import MaxAbsScaler

from examples.science.features import NGrams, field_features, windows
from examples.science.make import all_splits, asked_of, read_asked
from examples.science.scores import Score, label_scores, number_scores, word_scores
from examples.science.settings import Settings
from examples.science.splits import SPLITS
from examples.science.tasks import TASKS, Asked, Task

PENALTIES = (1.0, 10.0, 100.0, 1000.0)  # of ridge
STRENGTHS = (0.03, 0.3, 3.0)  # C of logistic regression
EXTRA_WINDOWS = 4  # of a chain, so that baselines see as much of it as experts
JUDGES = {"molecule": "gap", "formula": "bulk", "peptide": "antimicrobial"}  # by design task, who judges it
LABELS = "HEC"
MAX_LABELS = 300_000  # residues
Parts = dict[str, list[Asked]]
Matrices = dict[str, Any]  # by split [questions, features]


def measure(settings: Settings) -> None:
    """Write <output>/baselines.json, a task at a time; tasks that are there already are kept."""
    path = settings.output / "baselines.json"
    (settings.output / "judges").mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Score]] = json.loads(path.read_text()) if path.exists() else {}
    splits, _, _ = all_splits(settings)
    for domain, expert in settings.experts.items():
        for name in expert.shares:
            task = TASKS[name]
            if task.kind == "design" or name in results:
                continue
            parts = _parts(settings, task, splits[domain])
            results[name] = _labels(parts, settings) if task.kind == "labels" else _of_task(task, parts, settings)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(results, indent=1) + "\n")
            part.replace(path)
            print(f"{name}: {results[name]}", flush=True)


def _parts(settings: Settings, task: Task, splits: dict[str, Any]) -> Parts:
    """Questions of train and valid, and the test questions of the file that experts are asked."""
    import random

    draw = random.Random(settings.seed)
    repeats = EXTRA_WINDOWS if task.name in ("segment", "structure") else 1
    parts = {}
    for name in SPLITS[1:]:
        wanted = min(settings.baselines.max_rows, repeats * len(splits[name]))
        first = [task.ask(subject, draw) for subject in splits[name]]
        possible = sum(asked is not None for asked in first)
        parts[name] = asked_of(task.domain, splits[name], task, min(wanted, repeats * possible), draw, rewrite=False)
    return parts | {"test": read_asked(settings.output / "data/test" / f"{task.name}.jsonl")}


def _of_task(task: Task, parts: Parts, settings: Settings) -> dict[str, Score]:
    texts = {name: [asked.text for asked in part] for name, part in parts.items()}
    targets = {name: [asked.value for asked in part] for name, part in parts.items()}
    grams = NGrams(texts["train"])
    by_grams = {name: grams(part) for name, part in texts.items()}
    together = field_features(task.domain, [text for part in texts.values() for text in part])
    ends = np.cumsum([len(part) for part in texts.values()])
    by_field = {name: together[end - len(texts[name]) : end] for name, end in zip(texts, ends, strict=True)}
    linear, boosted = (_ridge, _boosted) if task.kind == "number" else (_logistic, _boosted_words)
    return {
        "majority or mean": _scored(task, _constant(task, targets), targets["test"]),
        "linear, n-grams": _scored(task, linear(by_grams, targets, settings), targets["test"]),
        "linear, field's features": _scored(task, linear(_scaled(by_field), targets, settings), targets["test"]),
        "boosting, field's features": _scored(task, boosted(by_field, targets, settings, task), targets["test"]),
    }


def _scored(task: Task, guesses: Sequence[Any], truths: Sequence[Any]) -> Score:
    if task.kind == "number":
        return number_scores([float(guess) for guess in guesses], truths, logarithms=task.unit == "GPa")
    return word_scores(list(guesses), truths)


def _constant(task: Task, targets: dict[str, Any]) -> list[Any]:
    train = targets["train"]
    guess = float(np.mean(train)) if task.kind == "number" else max(task.labels, key=train.count)
    return [guess] * len(targets["test"])


def _scaled(matrices: Matrices) -> Matrices:
    scaler = MaxAbsScaler().fit(matrices["train"])
    return {name: scaler.transform(matrix) for name, matrix in matrices.items()}


def _best(models: Sequence[Any], loss: Callable[[Any], float]) -> Any:
    losses = [loss(model) for model in models]
    return models[int(np.argmin(losses))]


def _ridge(matrices: Matrices, targets: dict[str, Any], settings: Settings) -> np.ndarray:
    models = [Ridge(alpha=penalty).fit(matrices["train"], targets["train"]) for penalty in PENALTIES]
    valid = np.array(targets["valid"])
    best = _best(models, lambda model: float(((model.predict(matrices["valid"]) - valid) ** 2).mean()))
    return best.predict(matrices["test"])


def _logistic(matrices: Matrices, targets: dict[str, Any], settings: Settings) -> np.ndarray:
    models = [LogisticRegression(C=c, max_iter=300).fit(matrices["train"], targets["train"]) for c in STRENGTHS]
    best = _best(models, lambda model: -float(model.score(matrices["valid"], targets["valid"])))
    return best.predict(matrices["test"])


def _train(options: dict[str, Any], train: Any, valid: Any, settings: Settings) -> lightgbm.Booster:
    """Trees until the loss on valid hasn't fallen for 50 of them."""
    common = {
        "learning_rate": 0.05,
        "num_leaves": 63,
        "min_data_in_leaf": 10,
        "feature_fraction": 0.5,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "seed": settings.seed,
        "num_threads": settings.baselines.threads,
        "verbosity": -1,
    }
    stop = lightgbm.early_stopping(50, verbose=False)
    sets = lightgbm.Dataset(train[0], train[1])
    held_out = lightgbm.Dataset(valid[0], valid[1], reference=sets)
    rounds = settings.baselines.rounds
    return lightgbm.train(common | options, sets, rounds, valid_sets=[held_out], callbacks=[stop])


def _boosted(matrices: Matrices, targets: dict[str, Any], settings: Settings, task: Task) -> np.ndarray:
    booster = _train(
        {"objective": "regression"},
        (matrices["train"], np.array(targets["train"])),
        (matrices["valid"], np.array(targets["valid"])),
        settings,
    )
    _keep(booster, task, settings)
    return booster.predict(matrices["test"], num_threads=settings.baselines.threads)


def _boosted_words(matrices: Matrices, targets: dict[str, Any], settings: Settings, task: Task) -> list[str]:
    codes = {name: np.array([task.labels.index(word) for word in words]) for name, words in targets.items()}
    options = {"objective": "multiclass", "num_class": len(task.labels)}
    train, valid = ((matrices[name], codes[name]) for name in ("train", "valid"))
    booster = _train(options, train, valid, settings)
    _keep(booster, task, settings)
    chances = booster.predict(matrices["test"], num_threads=settings.baselines.threads)  # [questions, labels]
    return [task.labels[code] for code in np.asarray(chances).argmax(axis=1)]


def _keep(booster: lightgbm.Booster, task: Task, settings: Settings) -> None:
    if task.name in JUDGES.values():
        booster.save_model(settings.output / "judges" / f"{task.name}.txt")


def _labels(parts: Parts, settings: Settings) -> dict[str, Score]:
    """The state of each residue from those around it, as GOR does; boosting sees the same window."""
    matrices, states = {}, {}
    for name, part in parts.items():
        rows = [sparse.csr_matrix(windows(asked.text)) for asked in part]
        most = len(rows) if name == "test" else 1 + MAX_LABELS // max(1, rows[0].shape[0])
        matrices[name] = sparse.vstack(rows[:most], format="csr")
        states[name] = np.array([LABELS.index(state) for asked in part[:most] for state in str(asked.value)])
    truths = [str(asked.value) for asked in parts["test"]]
    model = LogisticRegression(C=1.0, max_iter=100).fit(matrices["train"], states["train"])
    options = {"objective": "multiclass", "num_class": len(LABELS)}
    train, valid = ((matrices[name], states[name]) for name in ("train", "valid"))
    booster = _train(options, train, valid, settings)
    chances = np.asarray(booster.predict(matrices["test"], num_threads=settings.baselines.threads))
    common = np.bincount(states["train"]).argmax()
    guesses = {
        "majority or mean": np.full(len(states["test"]), common),
        "linear, windows": model.predict(matrices["test"]),
        "boosting, windows": chances.argmax(axis=1),
    }
    return {name: label_scores(_cut(codes, truths), truths) for name, codes in guesses.items()}


def _cut(codes: np.ndarray, truths: Sequence[str]) -> list[str]:
    """One string of states a sequence."""
    ends = np.cumsum([len(truth) for truth in truths])
    letters = "".join(LABELS[code] for code in codes)
    return [letters[end - len(truth) : end] for end, truth in zip(ends, truths, strict=True)]


def best_of(results: dict[str, Score], kind: str) -> tuple[str, Score]:
    """The best model's name and score."""
    measure_name = {"number": "r2", "word": "share", "labels": "q3"}[kind]
    return max(results.items(), key=lambda item: item[1][measure_name])


def judge_path(settings: Settings, design: str) -> Path:
    return settings.output / "judges" / f"{JUDGES[design]}.txt"
