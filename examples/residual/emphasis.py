"""Emphasise the right passage of a prompt: how often is the answer right, before and after?

    python examples/residual/emphasis.py --cases 400

Each prompt has several passages about people with similar names, of which one holds the answer. A retriever knows
which passage it is looking for; here the case itself does. Nothing is trained: attention to the passage is multiplied
before the softmax (a strength), or raised to a share in each head that pays it less (as SpotLight does, arXiv
2505.12025). Every case runs as requests of one engine: without steering; with the right passage emphasised in each way;
and as a control with a wrong passage, emphasised as much. Standard errors are those of a share of that many cases.
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.models.text.prompts import as_chat, encode_prompts
from loraplex.residual.steering import Span, Steering, spans_of_text

FIRST = ("Ada", "Bela", "Carla", "Doris", "Edith", "Frieda", "Greta", "Hanna", "Irma", "Jana")
LAST = ("Brown", "Green", "White", "Black", "Gray", "Rose", "Stone", "Wood", "Hill", "Field")
PLACES = ("library", "harbour", "museum", "station", "hospital", "theatre", "school", "bakery", "bank", "airport")
CASES_TOGETHER = 10


class Case(NamedTuple):
    """A question over passages; the answer, and what a wrong passage would answer, with their passages."""

    prompt: str
    passage: str
    answer: str
    wrong_passage: str
    wrong_answer: str


class Row(NamedTuple):
    """What a row of a case emphasises: the right passage or a wrong one, and how much; by default nothing."""

    name: str
    strength: float | None = None
    share: float | None = None
    wrong: bool = False

    def steering(self, spans: tuple[Span, ...]) -> tuple[Steering, ...]:
        if self.share is not None:
            return (Steering(spans=spans, share=self.share),)
        return () if self.strength is None else (Steering(spans=spans, strength=self.strength),)


class Answers(NamedTuple):
    """What the rows of all cases answered, by the row's name."""

    right: dict[str, int]
    misled: dict[str, int]  # gave what the wrong passage says
    texts: dict[str, list[str]]


def make_case(draw: random.Random, num_passages: int) -> Case:
    first = draw.sample(FIRST, 3)
    last = draw.sample(LAST, 3)
    people = draw.sample([f"{a} {b}" for a in first for b in last], num_passages)  # names that share their parts
    places = draw.sample(PLACES, num_passages)
    codes = draw.sample(range(1000, 10000), num_passages)
    passages = [
        f"{who} works at the {where}; the code is {code}."
        for who, where, code in zip(people, places, codes, strict=True)
    ]
    wanted, wrong = draw.sample(range(num_passages), 2)
    question = f"What is the code of {people[wanted]}? Answer with the number."
    return Case(
        prompt=" ".join(passages) + " " + question,
        passage=passages[wanted],
        answer=str(codes[wanted]),
        wrong_passage=passages[wrong],
        wrong_answer=str(codes[wrong]),
    )


def make_rows(strengths: list[float], shares: list[float]) -> list[Row]:
    """The prompt as it is, the right passage emphasised, and the controls: of each way the most of a wrong one."""
    rows = [Row("as it is")]
    rows += [Row(f"right passage, strength {strength:g}", strength=strength) for strength in strengths]
    rows += [Row(f"right passage, share {share:g}", share=share) for share in shares]
    rows += [Row(f"wrong passage, strength {one:g}", strength=one, wrong=True) for one in strengths[-1:]]
    return rows + [Row(f"wrong passage, share {one:g}", share=one, wrong=True) for one in shares[-1:]]


def requests_of(model: MultiLoraModel, case: Case, rows: list[Row]) -> list[Request]:
    """A request for each row."""
    chat = as_chat(model.tokenizer, case.prompt)
    spans = {
        wrong: spans_of_text(model.tokenizer, chat, passage)
        for wrong, passage in ((False, case.passage), (True, case.wrong_passage))
    }
    ids = encode_prompts(model.tokenizer, [case.prompt])["input_ids"][0].tolist()
    sampling = SamplingParams(max_tokens=16, temperature=0.0)
    return [Request(ids, steering=row.steering(spans[row.wrong]), sampling=sampling) for row in rows]


def answer_all(model: MultiLoraModel, cases: list[Case], rows: list[Row]) -> Answers:
    """Every case in all its rows; prints the first."""
    names = [row.name for row in rows]
    found = Answers(dict.fromkeys(names, 0), dict.fromkeys(names, 0), {name: [] for name in names})
    with Engine(model, EngineConfig(cache_bytes=2**28)) as engine:
        for first in track(range(0, len(cases), CASES_TOGETHER), "cases"):
            chosen = cases[first : first + CASES_TOGETHER]
            results = iter(engine.generate([asked for case in chosen for asked in requests_of(model, case, rows)]))
            for case in chosen:
                for name in names:
                    text = next(results).text
                    found.right[name] += case.answer in text
                    found.misled[name] += case.wrong_answer in text and case.answer not in text
                    found.texts[name].append(text)
    Console().print(cases[0].prompt, *(f"{name}: {found.texts[name][0]}" for name in names), sep="\n", highlight=False)
    return found


def with_error(count: int, num_cases: int) -> str:
    """A share and its standard error."""
    share = count / num_cases
    return f"{share:.3f} ± {math.sqrt(share * (1 - share) / num_cases):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--strengths", type=float, nargs="+", default=[4.0, 8.0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, default=None, help="JSON file for the result")
    options = parser.parse_args()

    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    draw = random.Random(options.seed)
    cases = [make_case(draw, options.passages) for _ in range(options.cases)]
    found = answer_all(model, cases, make_rows(options.strengths, options.shares))
    table = Table(title=f"{options.cases} questions over {options.passages} passages, {options.dtype}")
    for column in ("row", "right", "what the wrong passage says"):
        table.add_column(column)
    for name in found.right:
        table.add_row(name, *(with_error(counts[name], options.cases) for counts in (found.right, found.misled)))
    Console().print(table)
    if options.write is not None:
        content = {name: getattr(options, name) for name in ("model", "dtype", "cases", "passages", "seed")}
        shares = {name: count / options.cases for name, count in found.right.items()}
        misled = {name: count / options.cases for name, count in found.misled.items()}
        content |= {"right": shares, "says_wrong_passage": misled}
        options.write.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
