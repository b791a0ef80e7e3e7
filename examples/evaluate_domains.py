"""Held-out quality of the science adapters beside the base model's.

    python examples/evaluate_domains.py --adapters runs/science --write examples/adapters/quality.json

Every domain's held-out questions go through the base model and all adapters in shared batches, so the table also
shows what an adapter knows outside its own domain.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loraplex import MultiLoraModel
from loraplex.training.adapters.evaluation import evaluate, read_questions


def majority(answers: list[str]) -> float:
    return Counter(answers).most_common(1)[0][1] / len(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--adapters", type=Path, default=Path("examples/adapters"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--limit", type=int, default=None, help="questions of each domain; default all")
    parser.add_argument("--write", type=Path, default=None, help="JSON file for the scores")
    options = parser.parse_args()

    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    names = sorted(path.parent.name for path in options.adapters.glob("*/adapter_config.json"))
    for name in names:
        model.load_adapter(name, options.adapters / name)
    table = Table(title="held-out exact match (share of the answers' words among labels only)", title_justify="left")
    for column in ("domain", "questions", "majority", "base", *names):
        table.add_column(column)
    scores: dict[str, object] = {}
    for domain in names:
        questions = read_questions(options.data / domain / "test.jsonl", options.limit)
        results = evaluate(model, questions, [None, *names])
        common = majority([question.answer for question in questions])
        cells = [f"{score.exact:.3f} ({score.among_labels:.3f})" for score in results]
        table.add_row(domain, str(len(questions)), f"{common:.3f}", *cells)
        scores[domain] = {
            "num_questions": len(questions),
            "majority": round(common, 4),
            "exact": {name: round(s.exact, 4) for name, s in zip(["base", *names], results, strict=True)},
            "among_labels": {name: round(s.among_labels, 4) for name, s in zip(["base", *names], results, strict=True)},
        }
    Console().print(table)
    if options.write is not None:
        options.write.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
