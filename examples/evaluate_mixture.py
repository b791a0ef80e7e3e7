"""What a mixture is worth: on every domain and on tasks that need several, beside all that is simpler.

    python examples/evaluate_mixture.py --mixture examples/mixtures/science --write examples/mixtures/science.json
    python examples/evaluate_mixture.py --own --limit 400 --write examples/mixtures/science_own.json

The rows of every batch differ in nothing but their adapters: the base model, each expert alone, the experts' uniform
average, the best static weights (found on validation questions), and the mixture. Right is an answer whose every token
is the most likely one, which is what greedy generation would write. With --own, only the mixture and each domain's own
expert: enough questions to see differences of two points.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mixed_data import conversations, pairs
from rich.console import Console
from rich.progress import track
from rich.table import Table

from loraplex import MultiLoraModel
from loraplex.training.adapters.evaluation import Question, exact_matches, read_questions

MIXTURE = "science"
STATIC_WEIGHTS = (0.25, 0.4, 0.6, 0.8, 1.0)  # of every expert, tried on validation questions
Scores = dict[str, dict[str, float]]  # by task: number of questions, and the share of right answers by column
console = Console()


def neutral(question: Question) -> Question:
    """The same question without the words that name its domain: "Classify: SUBJECT (low, medium or high)."."""
    head, _, tail = question.prompt.partition(":")
    subject = head.split(" ", 1)[1].removeprefix("segment ")
    options = tail.strip().removeprefix("is its HOMO-LUMO gap ").removeprefix("is its bulk modulus ")
    options = options.removeprefix("is its melting point ").removeprefix("is it antimicrobial, ").rstrip("?")
    return Question(prompt=f"Classify: {subject} ({options}).", answer=question.answer)


def tasks_of(data: Path, names: Sequence[str], limit: int) -> dict[str, list[Question]]:
    domains = {name: read_questions(data / name / "test.jsonl", limit) for name in names}
    per_domain = max(1, limit // len(names))
    pool = [question for questions in domains.values() for question in questions[-per_domain:]]
    return domains | {
        "neutral wording": [neutral(question) for question in pool],
        "conversations": conversations(domains, limit),
        "two questions": pairs(domains, limit),
    }


def link(names: Sequence[str], weight: float) -> str:
    return "+".join(f"{name}:{weight}" for name in names)


def best_static_weight(model: MultiLoraModel, data: Path, experts: Mapping[str, str], limit: int) -> float:
    """The weight, the same for all experts, that answers most validation questions of all domains."""
    questions = [q for domain in experts for q in read_questions(data / domain / "valid.jsonl", limit)]
    scores = exact_matches(model, questions, [link(list(experts.values()), weight) for weight in STATIC_WEIGHTS])
    return max(zip(scores, STATIC_WEIGHTS, strict=True))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mixture", type=Path, default=Path("examples/mixtures/science"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--limit", type=int, default=200, help="questions of each task")
    parser.add_argument("--static-limit", type=int, default=20, help="validation questions of each domain")
    parser.add_argument("--tasks", nargs="+", default=None, help="only these, by name")
    parser.add_argument("--only-mixture", action="store_true", help="leave out what the mixture is compared with")
    parser.add_argument("--own", action="store_true", help="each domain's expert beside the mixture, and nothing else")
    parser.add_argument("--write", type=Path, default=None, help="JSON file for the scores")
    options = parser.parse_args()

    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    model.load_mixture(MIXTURE, options.mixture)
    experts = model.mixtures.get(MIXTURE).experts
    names = [expert.removeprefix(f"{MIXTURE}/") for expert in experts]
    rename = dict(zip(names, experts, strict=True))
    if options.own:
        scores = against_own(model, options.data, rename, options.limit)
        show(scores, ["its expert", "X-LoRA"])
        write(options.write, scores)
        return
    choices: dict[str, str | None] = {}
    if not options.only_mixture:
        static = best_static_weight(model, options.data, rename, options.static_limit)
        choices = {"base": None, **rename}
        choices["uniform average"] = link(experts, round(1 / len(experts), 4))
        choices[f"static {static}"] = link(experts, static)
    choices["X-LoRA"] = MIXTURE
    scores = {}
    tasks = tasks_of(options.data, names, options.limit)
    tasks = {name: tasks[name] for name in options.tasks or tasks}
    for task, questions in track(tasks.items(), console=console):
        results = exact_matches(model, questions, list(choices.values()))
        scores[task] = {"num_questions": len(questions)} | dict(zip(choices, results, strict=True))
    if set(names) <= set(scores):
        scores["all domains"] = {
            key: sum(scores[name][key] for name in names) / len(names) for key in (*choices, "num_questions")
        }
    show(scores, list(choices))
    write(options.write, scores)


def against_own(model: MultiLoraModel, data: Path, experts: Mapping[str, str], limit: int) -> Scores:
    """Every domain's questions through its expert and through the mixture."""
    scores = {}
    for domain, expert in track(experts.items(), console=console):
        questions = read_questions(data / domain / "test.jsonl", limit)
        own, mixed = exact_matches(model, questions, [expert, MIXTURE])
        scores[domain] = {"num_questions": len(questions), "its expert": own, "X-LoRA": mixed}
    return scores


def write(path: Path | None, scores: Scores) -> None:
    if path is not None:
        path.write_text(json.dumps(scores, indent=2) + "\n")


def show(scores: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> None:
    table = Table(title="held-out exact match", title_justify="left")
    for column in ("task", "questions", *columns):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, row in scores.items():
        best = max(row[column] for column in columns)
        cells = [f"[bold]{row[c]:.3f}[/]" if row[c] == best else f"{row[c]:.3f}" for c in columns]
        table.add_row(task, f"{row['num_questions']:.0f}", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
