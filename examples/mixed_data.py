"""The data that a mixture's head learns from: a sample of each domain, and conversations that go from one to another.

    python examples/mixed_data.py --output runs/mixed-data

A conversation asks a question of one domain, answers it, and asks one of another domain. Only the experts of single
questions are there, so its second answer needs scalings that change on the way. Two questions of different domains in
one prompt are to be answered "low; helix": a form that no expert of single questions knows, so that a little of it
(`--share two-questions=0.1` beside the other sources) is for training experts and gates together.
"""

import argparse
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from loraplex.training.adapters.evaluation import Question, read_questions

DOMAINS = ("quantum", "materials", "protein", "peptides")


def conversations(domains: Mapping[str, Sequence[Question]], count: int, seed: int = 0) -> list[Question]:
    """Questions that come after a question of another domain and its answer; all ordered pairs equally often."""
    draw = random.Random(seed)
    pairs = list(itertools.permutations(domains, 2))
    made = []
    for i in range(count):
        first, second = (draw.choice(domains[name]) for name in pairs[i % len(pairs)])
        history = ({"role": "user", "content": first.prompt}, {"role": "assistant", "content": first.answer})
        made.append(Question(prompt=second.prompt, answer=second.answer, history=history))
    return made


def pairs(domains: Mapping[str, Sequence[Question]], count: int, seed: int = 0) -> list[Question]:
    """Two questions of different domains in one prompt, to be answered "first; second"; all ordered pairs alike."""
    draw = random.Random(seed)
    names = list(itertools.permutations(domains, 2))
    made = []
    for i in range(count):
        first, second = (draw.choice(domains[name]) for name in names[i % len(names)])
        made.append(Question(prompt=f"{first.prompt} {second.prompt}", answer=f"{first.answer}; {second.answer}"))
    return made


def write(path: Path, questions: Sequence[Question]) -> None:
    records = [{"messages": [*q.messages, {"role": "assistant", "content": q.answer}]} for q in questions]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("runs/mixed-data"))
    parser.add_argument("--train", type=int, default=1000, help="training records of each kind")
    parser.add_argument("--valid", type=int, default=60, help="validation records of each kind")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", options.train), ("valid", options.valid)):
        whole = {name: read_questions(options.data / name / f"{split}.jsonl") for name in DOMAINS}
        sampled = {name: random.Random(0).sample(questions, count) for name, questions in whole.items()}
        mixed = {"conversations": conversations(sampled, count), "two-questions": pairs(sampled, count)}
        for name, questions in (sampled | mixed).items():
            write(options.output / f"{name}.{split}.jsonl", questions)


if __name__ == "__main__":
    main()
