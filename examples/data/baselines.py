"""How far do counting and a linear model get? Baselines for data/<domain>/, measured on test.jsonl.

    python examples/data/baselines.py     # a minute on two cores; needs only numpy

majority: the most frequent answer in train. n-grams: logistic regression on which runs of 1 to 3
characters of the subject (the SMILES, the formula, the residues, the name) occur and how often.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from make_data import DOMAINS, OUTPUT

LONGEST = 3  # characters of an n-gram
MIN_ROWS = 3  # of train an n-gram must occur in
MAX_FEATURES = 6000
PENALTIES = (1e-3, 3e-3, 1e-2)  # the best on valid.jsonl is used
STEPS = 300
LEARNING_RATE = 0.01


def load(path: Path) -> tuple[list[str], list[str]]:
    """Return subjects and answers; spaces between residues are dropped."""
    subjects, answers = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        subject = user["content"].rsplit(":", 1)[0].removeprefix("Protein segment ")
        subjects.append(subject.replace(" ", "") if path.parent.name in ("protein", "peptides") else subject)
        answers.append(assistant["content"])
    return subjects, answers


def ngrams(text: str) -> Counter[str]:
    """Return how often each run of 1 to LONGEST characters occurs."""
    return Counter(
        text[start : start + size] for size in range(1, LONGEST + 1) for start in range(len(text) - size + 1)
    )


def vocabulary(texts: list[str]) -> dict[str, int]:
    """Return a column number for each of the most widespread n-grams."""
    spread = Counter(gram for text in texts for gram in ngrams(text))
    grams = [gram for gram, count in spread.most_common(MAX_FEATURES) if count >= MIN_ROWS]
    return {gram: column for column, gram in enumerate(grams)}


def features(texts: list[str], columns: dict[str, int]) -> np.ndarray:
    """Return log(1 + count) of each n-gram and a constant column: [rows, features + 1]."""
    table = np.zeros((len(texts), len(columns) + 1), dtype=np.float32)
    table[:, -1] = 1.0
    for row, text in enumerate(texts):
        for gram, count in ngrams(text).items():
            if gram in columns:
                table[row, columns[gram]] = np.log1p(count)
    return table


def fit(table: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    """Return softmax regression weights [features, classes], full-batch Adam with an L2 penalty.

    table: [rows, features]; targets: [rows, classes], one-hot.
    """
    weights = np.zeros((table.shape[1], targets.shape[1]), dtype=np.float32)
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, STEPS + 1):
        scores = table @ weights
        chances = np.exp(scores - scores.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        gradient = table.T @ (chances - targets) / len(table) + penalty * weights
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        rate = LEARNING_RATE * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        weights -= rate * mean / (np.sqrt(square) + 1e-8)
    return weights


def measure(folder: Path, labels: tuple[str, ...]) -> tuple[float, float]:
    """Return the accuracies of the majority answer and of the n-gram model on test.jsonl."""
    parts = {name: load(folder / f"{name}.jsonl") for name in ("train", "valid", "test")}
    columns = vocabulary(parts["train"][0])
    tables = {name: features(texts, columns) for name, (texts, _) in parts.items()}
    truth = {name: np.array([labels.index(word) for word in answers]) for name, (_, answers) in parts.items()}

    def accuracy(weights: np.ndarray, name: str) -> float:
        return float(np.mean((tables[name] @ weights).argmax(axis=1) == truth[name]))

    targets = np.eye(len(labels), dtype=np.float32)[truth["train"]]
    models = [fit(tables["train"], targets, penalty) for penalty in PENALTIES]
    best = max(models, key=lambda weights: accuracy(weights, "valid"))
    majority = float(np.mean(truth["test"] == np.bincount(truth["train"]).argmax()))
    return majority, accuracy(best, "test")


def main() -> None:
    """Print a Markdown table of the baselines."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", type=Path, default=OUTPUT, help="folder that make_data.py wrote")
    options = parser.parse_args()
    print("| domain | majority | n-grams |\n|---|---|---|")
    for name, domain in DOMAINS.items():
        majority, linear = measure(options.data / name, domain.labels)
        print(f"| {name} | {majority:.3f} | {linear:.3f} |", flush=True)


if __name__ == "__main__":
    main()
