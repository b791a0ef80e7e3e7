"""One table of what mixtures are worth: every domain and every mixed task, beside all that is simpler.

    python examples/mixture_table.py --limit 400 --mixed-limit 200 --write examples/mixtures/quality.json \
        --router linear=runs/router/science --router distilled=runs/distilled/science

Columns: the base model; each domain's expert alone; the experts' uniform average and best static weight; Arrow and
SpectR, which need no training; trained routers (--router NAME=FOLDER); and an X-LoRA. Questions are the first rows of
data/<domain>/test.jsonl, of which no training takes any; the static weight is chosen on valid.jsonl. The engine answers
greedily, and right is an answer that begins with the right word or words, to the token.

The file keeps which questions were answered right, one digit each, so that differences have paired standard errors. A
cell that is there already isn't measured again: columns can be added later, and a run that was stopped goes on.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluate_mixture import STATIC_WEIGHTS, link, tasks_of
from rich.console import Console
from rich.table import Table

from loraplex import ArrowConfig, Engine, EngineConfig, MultiLoraModel, Request, SamplingParams, SpectrConfig
from loraplex.training.adapters.evaluation import Question, read_questions

DOMAINS = ("quantum", "materials", "protein", "peptides")
MIXED = ("neutral wording", "conversations", "two questions")
XLORA = "X-LoRA"
Digits = str  # of each question: 1 right, 0 wrong
console = Console()


class Results:
    """The cells measured so far, in a file that is written after each."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = path
        known = json.loads(path.read_text()) if path is not None and path.exists() else {"settings": dict(settings)}
        if known["settings"] != settings:
            raise SystemExit(f"{path} has other settings: {known['settings']}. Give another file, or remove this one.")
        self.content: dict[str, Any] = {"right": {}} | known

    @property
    def right(self) -> dict[str, dict[str, Digits]]:  # by task and column
        found: dict[str, dict[str, Digits]] = self.content["right"]
        return found

    def add(self, task: str, column: str, digits: Digits) -> None:
        self.right.setdefault(task, {})[column] = digits
        self.content["scores"] = {task: scores_of(columns) for task, columns in self.right.items()}
        if self._path is not None:
            self._path.write_text(json.dumps(self.content, indent=1) + "\n")


def share(digits: Digits) -> float:
    return digits.count("1") / len(digits)


def standard_error(digits: Digits) -> float:
    """Of a share: sqrt(p (1 - p) / n)."""
    return math.sqrt(share(digits) * (1 - share(digits)) / len(digits))


def paired_error(one: Digits, other: Digits) -> float:
    """Of the difference of two shares on the same questions."""
    differences = [int(a) - int(b) for a, b in zip(one, other, strict=True)]
    mean = sum(differences) / len(differences)
    return math.sqrt(sum((d - mean) ** 2 for d in differences)) / len(differences)


def scores_of(columns: Mapping[str, Digits]) -> dict[str, Any]:
    return {
        column: {
            "num_questions": len(digits),
            "right": round(share(digits), 4),
            "standard_error": round(standard_error(digits), 4),
        }
        for column, digits in columns.items()
    }


def load(model: MultiLoraModel, options: argparse.Namespace) -> dict[str, str | None]:
    """By column, what its rows ask for; a static weight's column is added when the weight is known."""
    for name in DOMAINS:
        model.load_adapter(name, options.experts / name)
    model.create_mixture("arrow", DOMAINS, ArrowConfig(top_k=options.top_k, temperature=options.temperature))
    model.create_mixture("spectr", DOMAINS, SpectrConfig(top_k=options.top_k, temperature=options.temperature))
    columns: dict[str, str | None] = {"base": None, **{name: name for name in DOMAINS}}
    columns |= {"uniform": link(DOMAINS, 1 / len(DOMAINS)), "Arrow": "arrow", "SpectR": "spectr"}
    for name, folder in (option.split("=", 1) for option in options.router):
        load_router(model, f"router-{name}", Path(folder), options.xlora)
        columns[name] = f"router-{name}"
    model.load_mixture("xlora", options.xlora)
    return columns | {XLORA: "xlora"}


def load_router(model: MultiLoraModel, name: str, folder: Path, experts: Path) -> None:
    """Load a trained router; one that was saved without its experts gets those in `experts`."""
    if (folder / DOMAINS[0]).is_dir():
        model.load_mixture(name, folder)
    else:
        model.load_mixture(name, folder, experts={f"{name}/{domain}": experts / domain for domain in DOMAINS})


def answered(engine: Engine, model: MultiLoraModel, questions: Sequence[Question], choice: str | None) -> Digits:
    """Whether each question is answered right through these adapters."""
    wanted = [model.tokenizer(question.answer, add_special_tokens=False)["input_ids"] for question in questions]
    requests = [
        Request(question.messages, adapters=choice, sampling=SamplingParams(max_tokens=len(answer), temperature=0.0))
        for question, answer in zip(questions, wanted, strict=True)
    ]
    results = engine.generate(requests)
    return "".join(str(int(list(r.token_ids) == answer)) for r, answer in zip(results, wanted, strict=True))


def best_static(engine: Engine, model: MultiLoraModel, data: Path, limit: int) -> str:
    """The link with the weight, the same for all experts, that answers most validation questions of all domains."""
    questions = [q for domain in DOMAINS for q in read_questions(data / domain / "valid.jsonl", limit)]
    links = [link(DOMAINS, weight) for weight in STATIC_WEIGHTS]
    return max((share(answered(engine, model, questions, each)), each) for each in links)[1]


def order(tasks: Sequence[str], columns: Sequence[str]) -> list[tuple[str, str]]:
    """All cells; first each domain's own expert and the mixtures, last the experts of other domains."""
    foreign = [(task, column) for task in tasks for column in columns if column in DOMAINS and column != task]
    cells = [(task, column) for task in tasks for column in columns]
    return [cell for cell in cells if cell not in foreign] + foreign


def show(results: Results, columns: Sequence[str]) -> None:
    table = Table(title="right answers in percent (standard error)", title_justify="left")
    for name in ("task", "questions", *columns):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, cells in results.right.items():
        texts = [
            f"{100 * share(cells[c]):.1f} ({100 * standard_error(cells[c]):.1f})" if c in cells else "" for c in columns
        ]
        table.add_row(task, str(len(next(iter(cells.values())))), *texts)
    console.print(table)
    against_experts(results, columns)


def against_experts(results: Results, columns: Sequence[str]) -> None:
    """How many points each column is above the domain's own expert, on the same questions."""
    table = Table(title="points above the domain's expert (paired standard error)", title_justify="left")
    domains = [domain for domain in DOMAINS if domain in results.right.get(domain, {})]
    for name in ("column", *domains, "mean"):
        table.add_column(name, justify="left" if name == "column" else "right")
    for column in (name for name in columns if name not in DOMAINS):
        cells = {d: results.right[d] for d in domains if column in results.right[d]}
        if len(cells) < len(domains) or not domains:
            continue
        gains = [100 * (share(of[column]) - share(of[d])) for d, of in cells.items()]
        errors = [100 * paired_error(of[column], of[d]) for d, of in cells.items()]
        mean_error = math.sqrt(sum(error**2 for error in errors)) / len(errors)
        texts = [f"{gain:+.1f} ({error:.1f})" for gain, error in zip(gains, errors, strict=True)]
        table.add_row(column, *texts, f"{sum(gains) / len(gains):+.1f} ({mean_error:.1f})")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--experts", type=Path, default=Path("examples/adapters"), help="folder with the four adapters")
    parser.add_argument("--xlora", type=Path, default=Path("examples/mixtures/science"))
    parser.add_argument("--router", action="append", default=[], help="NAME=FOLDER of a trained router, repeatable")
    parser.add_argument("--top-k", type=int, default=2, help="of Arrow and SpectR")
    parser.add_argument("--temperature", type=float, default=1.0, help="of Arrow and SpectR")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--limit", type=int, default=400, help="questions of each domain")
    parser.add_argument("--mixed-limit", type=int, default=200, help="questions of each mixed task")
    parser.add_argument("--static-limit", type=int, default=100, help="validation questions of each domain")
    parser.add_argument("--columns", nargs="+", default=None, help="only these, by name; 'static' too")
    parser.add_argument("--write", type=Path, default=None, help="JSON file of results, gone on with if it is there")
    options = parser.parse_args()

    names = ("model", "dtype", "experts", "data", "limit", "mixed_limit", "static_limit", "top_k", "temperature")
    results = Results(options.write, {name: _plain(getattr(options, name)) for name in names})
    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    columns = load(model, options)
    wanted = options.columns or [*columns, "static"]
    whole = tasks_of(options.data, DOMAINS, options.limit)
    limits = {name: options.limit if name in DOMAINS else options.mixed_limit for name in (*DOMAINS, *MIXED)}
    tasks = {name: whole[name][:limit] for name, limit in limits.items()}
    with Engine(model, EngineConfig()) as engine:
        if "static" in wanted:
            if "static" not in results.content:
                results.content["static"] = best_static(engine, model, options.data, options.static_limit)
            columns["static"] = results.content["static"]
        for task, column in order(list(tasks), [column for column in columns if column in wanted]):
            if column not in results.right.get(task, {}):
                results.add(task, column, answered(engine, model, tasks[task], columns[column]))
                console.print(f"{task}, {column}: {100 * share(results.right[task][column]):.1f}")
    show(results, list(columns))


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
