"""Emphasise the right passage of a prompt: how often is the answer right, before and after?

    python examples/residual/emphasis.py --cases 400 --key-edits --keep runs/emphasis.jsonl

Each prompt has several passages about people with similar names, of which one holds the answer. A retriever knows
which passage it is looking for; here the case itself does. Nothing is trained: attention to the passage is multiplied
before the softmax (a strength), or raised to a share in each head that pays it less (as SpotLight does, arXiv
2505.12025); with --key-edits also the passage's keys are edited (SEKA, key_edits.py), as strongly as is best in 60
other cases. Every case runs as requests of one engine: without steering; with the right passage emphasised in each way;
and as a control with a wrong passage, emphasised as much. Standard errors are those of a share of that many cases.

--keep writes down each answer; a run that was stopped goes on from there.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import key_edits
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.models.text.prompts import as_chat, encode_prompts
from loraplex.residual.steering import Span, Steering, spans_of_text

FIRST = ("Ada", "Bela", "Carla", "Doris", "Edith", "Frieda", "Greta", "Hanna", "Irma", "Jana")
LAST = ("Brown", "Green", "White", "Black", "Gray", "Rose", "Stone", "Wood", "Hill", "Field")
PLACES = ("library", "harbour", "museum", "station", "hospital", "theatre", "school", "bakery", "bank", "airport")
CASES_TOGETHER = 10
MAX_TOKENS = 16  # of an answer
KEY_EDITS = "key edits"
GAINS, HEADS = (0.5, 1.0, 2.0, 4.0), (0.25, 0.5, 1.0)  # that are tried


class Case(NamedTuple):
    """A question over passages; the answer, and what a wrong passage would answer, with their passages."""

    passages: str
    question: str
    wrong_question: str
    passage: str
    answer: str
    wrong_passage: str
    wrong_answer: str

    @property
    def prompt(self) -> str:
        return f"{self.passages} {self.question}"


class Row(NamedTuple):
    """What a row of a case emphasises: the right passage or a wrong one, and how; by default nothing."""

    name: str
    strength: float | None = None
    share: float | None = None
    edits_keys: bool = False
    wrong: bool = False

    def steering(self, spans: tuple[Span, ...]) -> tuple[Steering, ...]:
        if self.share is not None:
            return (Steering(spans=spans, share=self.share),)
        return () if self.strength is None else (Steering(spans=spans, strength=self.strength),)


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
    question, wrong_question = (
        f"What is the code of {people[one]}? Answer with the number." for one in (wanted, wrong)
    )
    return Case(
        passages=" ".join(passages),
        question=question,
        wrong_question=wrong_question,
        passage=passages[wanted],
        answer=str(codes[wanted]),
        wrong_passage=passages[wrong],
        wrong_answer=str(codes[wrong]),
    )


def in_parts(things: list[Any], size: int) -> list[list[Any]]:
    return [things[start : start + size] for start in range(0, len(things), size)]


def make_cases(seed: int, num_cases: int, num_passages: int) -> list[Case]:
    draw = random.Random(seed)
    return [make_case(draw, num_passages) for _ in range(num_cases)]


def make_rows(strengths: list[float], shares: list[float], *, edits_keys: bool) -> list[Row]:
    """The prompt as it is, the right passage emphasised, and the controls: of each way the most of a wrong one."""
    rows = [Row("as it is")]
    rows += [Row(f"right passage, strength {strength:g}", strength=strength) for strength in strengths]
    rows += [Row(f"right passage, share {share:g}", share=share) for share in shares]
    rows += [Row(f"right passage, {KEY_EDITS}", edits_keys=True)] if edits_keys else []
    rows += [Row(f"wrong passage, strength {one:g}", strength=one, wrong=True) for one in strengths[-1:]]
    rows += [Row(f"wrong passage, share {one:g}", share=one, wrong=True) for one in shares[-1:]]
    return rows + ([Row(f"wrong passage, {KEY_EDITS}", edits_keys=True, wrong=True)] if edits_keys else [])


def requests_of(model: MultiLoraModel, case: Case, rows: list[Row]) -> list[Request]:
    """A request for each row."""
    chat = as_chat(model.tokenizer, case.prompt)
    spans = {
        wrong: spans_of_text(model.tokenizer, chat, passage)
        for wrong, passage in ((False, case.passage), (True, case.wrong_passage))
    }
    ids = encode_prompts(model.tokenizer, [case.prompt])["input_ids"][0].tolist()
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    return [Request(ids, steering=row.steering(spans[row.wrong]), sampling=sampling) for row in rows]


class Answers:
    """The answers so far, by case and row, and the file that keeps them."""

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        """Reads what a run with the same settings has kept."""
        self._file, self._texts = file, {}
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().split("\n")[:-1] if file.exists() else []  # a killed run may have left half a line
        if lines and json.loads(lines[0]) != settings:
            raise SystemExit(f"{file} is of a run with other settings: {lines[0]}. Name another file.")
        with file.open("w") as whole:
            whole.writelines(f"{line}\n" for line in lines or [json.dumps(settings)])
        for line in lines[1:]:
            case, row, text = json.loads(line)
            self._texts[case, row] = text

    def has(self, case: int, row: str) -> bool:
        return (case, row) in self._texts

    def add(self, found: Sequence[tuple[int, str, str]]) -> None:
        """Cases, rows and their answers."""
        self._texts.update({(case, row): text for case, row, text in found})
        if self._file is not None:
            with self._file.open("a") as file:
                file.writelines(json.dumps(one) + "\n" for one in found)

    def of(self, row: str, num_cases: int) -> list[str]:
        return [self._texts[case, row] for case in range(num_cases)]


def steer_all(model: MultiLoraModel, cases: list[Case], rows: list[Row], answers: Answers) -> None:
    """Every case in all rows that steer, as requests of one engine."""
    wanted = [
        (number, [row for row in rows if not row.edits_keys and not answers.has(number, row.name)])
        for number in range(len(cases))
    ]
    wanted = [(number, own) for number, own in wanted if own]
    with Engine(model, EngineConfig(cache_bytes=2**28)) as engine:
        for some in track(in_parts(wanted, CASES_TOGETHER), "steered"):
            asked = [(number, row) for number, own in some for row in own]
            results = engine.generate([r for number, own in some for r in requests_of(model, cases[number], own)])
            answers.add([(number, row.name, r.text) for (number, row), r in zip(asked, results, strict=True)])


def learn_key_edits(model: MultiLoraModel, options: argparse.Namespace) -> tuple[Tensor, dict[str, Any]]:
    """The edits that gave most right answers in some other cases, and how many each did."""
    cases = make_cases(options.seed + 1, options.learnt_from, options.passages)
    triples = [key_edits.Triple(c.passages, c.answer, c.question, c.wrong_question) for c in cases]
    learnt = key_edits.learn(model, triples)
    cases = make_cases(options.seed + 2, options.tried_on, options.passages)
    right: dict[tuple[float, float], float] = {}
    for gain, heads in track([(gain, heads) for gain in GAINS for heads in HEADS], "key edits tried"):
        prompts, parts = [case.prompt for case in cases], [case.passage for case in cases]
        texts = key_edits.answer(model, prompts, parts, learnt.of(gain, heads), MAX_TOKENS)
        right[gain, heads] = sum(c.answer in text for c, text in zip(cases, texts, strict=True)) / len(cases)
    gain, heads = max(right, key=right.__getitem__)
    tried = {f"gain {gain:g}, {heads:.0%} of the heads": found for (gain, heads), found in right.items()}
    return learnt.of(gain, heads), {"gain": gain, "heads": heads, "right_when_tried": tried}


def edit_all(model: MultiLoraModel, cases: list[Case], rows: list[Row], answers: Answers, added: Tensor) -> None:
    """Every case in all rows that edit keys."""
    for row in rows:
        missing = [n for n in range(len(cases)) if row.edits_keys and not answers.has(n, row.name)]
        for some in track(in_parts(missing, key_edits.BATCH), row.name) if missing else ():
            chosen = [cases[number] for number in some]
            parts = [case.wrong_passage if row.wrong else case.passage for case in chosen]
            texts = key_edits.answer(model, [case.prompt for case in chosen], parts, added, MAX_TOKENS)
            answers.add([(number, row.name, text) for number, text in zip(some, texts, strict=True)])


def judged(cases: list[Case], rows: list[Row], answers: Answers) -> dict[str, dict[str, int]]:
    """By row, how many answers are right, and how many give what the wrong passage says."""
    right, misled = {}, {}
    for row in rows:
        pairs = list(zip(cases, answers.of(row.name, len(cases)), strict=True))
        right[row.name] = sum(case.answer in text for case, text in pairs)
        misled[row.name] = sum(case.wrong_answer in text and case.answer not in text for case, text in pairs)
    return {"right": right, "says_wrong_passage": misled}


def with_error(count: int, num_cases: int) -> str:
    """A share and its standard error."""
    share = count / num_cases
    return f"{share:.3f} ± {math.sqrt(share * (1 - share) / num_cases):.3f}"


def show(cases: list[Case], rows: list[Row], answers: Answers, counts: dict[str, dict[str, int]], dtype: str) -> None:
    """The first case, and a table of all."""
    first = [f"{row.name}: {answers.of(row.name, 1)[0]}" for row in rows]
    Console().print(cases[0].prompt, *first, sep="\n", highlight=False)
    table = Table(title=f"{len(cases)} questions, {dtype}")
    for column in ("row", "right", "what the wrong passage says"):
        table.add_column(column)
    for row in rows:
        table.add_row(row.name, *(with_error(found[row.name], len(cases)) for found in counts.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--strengths", type=float, nargs="*", default=[4.0, 8.0])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.2, 0.3])
    parser.add_argument("--key-edits", action="store_true", help="also edit the passage's keys (SEKA)")
    parser.add_argument("--learnt-from", type=int, default=100, help="other cases, of which key edits are made")
    parser.add_argument("--tried-on", type=int, default=60, help="others, that choose how strongly keys are edited")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=None, help="file for each answer; goes on with what is there")
    parser.add_argument("--write", type=Path, default=None, help="JSON file for the result")
    options = parser.parse_args()

    start = time.process_time()
    settings = {name: getattr(options, name) for name in ("model", "dtype", "passages", "seed")}
    answers = Answers(options.keep, settings)
    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    cases = make_cases(options.seed, options.cases, options.passages)
    rows = make_rows(options.strengths, options.shares, edits_keys=options.key_edits)
    steer_all(model, cases, rows, answers)
    content: dict[str, Any] = {**settings, "cases": options.cases}
    if options.key_edits:
        added, content["key_edits"] = learn_key_edits(model, options)
        edit_all(model, cases, rows, answers, added)
    counts = judged(cases, rows, answers)
    show(cases, rows, answers, counts, options.dtype)
    Console().print(f"{(time.process_time() - start) / 60:.1f} CPU minutes")
    if options.write is not None:
        content |= {name: {row: n / options.cases for row, n in found.items()} for name, found in counts.items()}
        options.write.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
