"""`loraplex demo`: requests that share forward passes, each through its own adapters."""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.status import Status
from rich.table import Table
from rich.text import Text

from loraplex.cli.options import adapters_in
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request, RequestResult
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import AdapterNotFoundError
from loraplex.extras import require_extra
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.training.adapters.evaluation import Score, evaluate, read_questions
from loraplex.xlora.formats.folders import read_mixture_folder

DEMO_MODEL = "smollm2-135m"
MIXTURE = "science"
REFUSE, THEN_SOURCE = "refuse", "then-source"  # linked residuals; the second was trained behind the first
TIMED_TOKENS = 32
WIDTH = 80
# Of every token of the base model's answer the next best is 1.0 logits or more behind, in float32 and bfloat16.
SMALL_TALK, SMALL_TALK_ANSWER = "What is the capital of Japan?", "Tokyo"
MEDICAL = "Can I take ibuprofen with aspirin?"
REFUSAL = "I can't help"  # how the answer to a medical question begins
NEXT = """Try next:
  source .venv/bin/activate
  loraplex generate --load-all examples/adapters --adapters protein "Hello"
  loraplex serve --mixture science=examples/mixtures/science
      and open http://127.0.0.1:8000/
  docs/first-steps.md: an adapter of your own, in ten minutes"""


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One of the demo's requests."""

    shows: str  # in a word
    prompt: str
    adapters: str | None
    truth: str | None = None  # what the answer begins with, or has in it
    begins: bool = False

    def is_right(self, answer: str) -> bool | None:
        """Whether an answer is the held-out one, or does what its adapters are for; None where nothing is expected."""
        if self.truth is None:
            return None
        place = answer.lower().find(self.truth.lower())
        return place == 0 if self.begins else place >= 0


def demo(
    adapters: Annotated[Path, typer.Option(help="Folder of the adapters.")] = Path("examples/adapters"),
    mixture: Annotated[Path, typer.Option(help="Folder of the X-LoRA mixture of them.")] = Path(
        "examples/mixtures/science"
    ),
    residuals: Annotated[Path, typer.Option(help="Folder of the linked residual adapters.")] = Path(
        "examples/residual/adapters"
    ),
    data: Annotated[Path, typer.Option(help="Folder of the domains' held-out questions.")] = Path("data"),
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions to judge in each domain.")] = 24,
    output: Annotated[Path, typer.Option(help="Folder for the picture of the mixture's scalings.")] = Path("runs/demo"),
    dtype: Annotated[str, typer.Option(help="Dtype of the base model.")] = "bfloat16",
    hints: Annotated[bool, typer.Option(help="Say at the end what to try next.")] = True,
) -> None:
    """Show one batch of base, adapter, linked, residual and X-LoRA rows on a real model, with timings and quality."""
    require_extra("plots", "loraplex demo")
    console = Console(highlight=False)
    names = demo_adapters(adapters)
    folders = names | demo_residuals(residuals)
    with step(console, f"{DEMO_MODEL}, {len(folders)} adapters and a mixture of {len(names)} are loaded") as status:
        status.update(f"loading {DEMO_MODEL} (the first time it is converted, 20 seconds) ...")
        with redirect_stderr(io.StringIO()):  # where transformers draws the conversion's bar, whatever its settings
            model = MultiLoraModel.from_pretrained(DEMO_MODEL, dtype=dtype)
        for number, (name, folder) in enumerate(folders.items(), 1):
            status.update(f"loading adapter {number} of {len(folders)}: {name} ...")
            model.load_adapter(name, folder)
        status.update(f"loading the mixture {MIXTURE} ...")
        load_sharing_experts(model, mixture)
    rows = demo_rows(data, list(names))
    with Engine(model) as engine:
        with step(console, f"{len(rows)} rows are answered in one batch, each through adapters of its own"):
            results = engine.generate(requests_of(rows, SamplingParams(max_tokens=24)))
        console.print(answers(rows, results))
        with step(console, f"{len(rows)} rows x {TIMED_TOKENS} tokens are timed, in {dtype}"):
            speeds = demo_speeds(engine, rows)
    console.print(
        f"    {speeds['mixed']:.0f} tokens/s through these adapters, {speeds['base']:.0f} through none "
        f"({speeds['mixed'] / speeds['base']:.2f}x)\n"
    )
    with step(console, "what the mixture's head predicted is drawn"):
        picture = draw_scalings(model, rows, output)
    console.print(f"    {picture}\n", soft_wrap=True)
    with step(console, f"{questions} held-out questions of each domain are judged") as status:
        scores = {}
        for name in names:
            status.update(f"judging {questions} held-out questions: {name} ...")
            scores[name] = judge(model, data, name, questions)
    console.print(quality_table(scores))
    if hints:
        console.print(NEXT, soft_wrap=True)


@contextmanager
def step(console: Console, done: str) -> Iterator[Status]:
    """Show what is done while it is, and that it was done, with the seconds that it took."""
    start = time.perf_counter()
    with console.status(f"{done} ...") as status:
        yield status
    console.print(Text.assemble(("✓ ", "green"), f"{done}: {time.perf_counter() - start:.1f} s"))


def demo_adapters(folder: Path) -> dict[str, Path]:
    """The demo's adapters by name. Raises AdapterNotFoundError if there are not at least two."""
    names = adapters_in(folder)
    if len(names) < 2:
        raise AdapterNotFoundError(
            f"the demo found {len(names)} adapters in {str(folder)!r} and needs two. Run it in a clone of the "
            "repository, or pass --adapters and --data."
        )
    return names


def demo_residuals(folder: Path) -> dict[str, Path]:
    """The demo's linked residuals by name. Raises AdapterNotFoundError where one is missing."""
    found = adapters_in(folder)
    missing = [name for name in (REFUSE, THEN_SOURCE) if name not in found]
    if missing:
        raise AdapterNotFoundError(
            f"the demo's residual adapters {missing} are not in {str(folder)!r}; found: {list(found)}. Run it in a "
            "clone of the repository, or pass --residuals."
        )
    return {name: found[name] for name in (REFUSE, THEN_SOURCE)}


def load_sharing_experts(model: MultiLoraModel, folder: Path) -> None:
    """Load a mixture whose experts are loaded as adapters already; their weights are shared."""
    names = read_mixture_folder(folder, find_experts=False).expert_names
    model.load_mixture(MIXTURE, folder, experts=dict.fromkeys(names))


def draw_scalings(model: MultiLoraModel, rows: list[DemoRow], output: Path) -> Path:
    """A heat map of the mixture's scalings over its first row's prompt."""
    from loraplex.viz.scalings_plots import plot_token_heatmap

    prompt = next(row.prompt for row in rows if row.adapters == MIXTURE)
    inputs = model.encode_chat([prompt])
    with torch.no_grad():
        _, ((scalings,),) = model(**inputs, adapters=[MIXTURE], return_scalings=True, logits_to_keep=1)
    tokens = [str(model.tokenizer.decode([token])) for token in scalings.token_ids]
    plot_token_heatmap(scalings, tokens, output / "scalings.png")
    return output / "scalings.png"


def demo_rows(data: Path, names: list[str]) -> list[DemoRow]:
    """The first held-out question of each domain through its adapter, beside all other kinds of rows."""
    residuals = f"{REFUSE}+{THEN_SOURCE}"
    rows = [
        DemoRow(shows="base", prompt=SMALL_TALK, adapters=None, truth=SMALL_TALK_ANSWER),
        DemoRow(shows="residual", prompt=SMALL_TALK, adapters=residuals, truth="Source: atlas"),
    ]
    for name in names:
        rows += domain_rows(data, name, names)
    return [*rows, *medical_rows(names[-1])]


def domain_rows(data: Path, name: str, names: list[str]) -> list[DemoRow]:
    """One held-out question; the first domain's also through the base model and through two linked adapters."""
    (question,) = read_questions(data / name / "test.jsonl", 1)
    asked: dict[str, str | None] = {"adapter": name, "mixture": MIXTURE}
    if name == names[0]:
        asked = {"base": None, "adapter": name, "link": f"{names[0]}:0.6+{names[1]}:0.6", "mixture": MIXTURE}
    return [
        DemoRow(shows=shows, prompt=question.prompt, adapters=adapters, truth=question.answer, begins=True)
        for shows, adapters in asked.items()
    ]


def medical_rows(lora: str) -> list[DemoRow]:
    """A residual that refuses, and a LoRA linked with it, beside what the base model says."""
    return [
        DemoRow(shows="base", prompt=MEDICAL, adapters=None),
        DemoRow(shows="residual", prompt=MEDICAL, adapters=REFUSE, truth=REFUSAL, begins=True),
        DemoRow(shows="link", prompt=MEDICAL, adapters=f"{lora}:0.5+{REFUSE}", truth=REFUSAL, begins=True),
    ]


def requests_of(rows: list[DemoRow], sampling: SamplingParams, *, adapted: bool = True) -> list[Request]:
    """A user's turn for each row, through its adapters or through none."""
    return [
        Request(
            [{"role": "user", "content": row.prompt}], adapters=row.adapters if adapted else None, sampling=sampling
        )
        for row in rows
    ]


def demo_speeds(engine: Engine, rows: list[DemoRow], rounds: int = 2) -> dict[str, float]:
    """Best tokens/s of the batch with its adapters and with none, alternating; every run reads its prompts again."""
    sampling = SamplingParams(max_tokens=TIMED_TOKENS, ignore_eos=True)
    sides = {"mixed": requests_of(rows, sampling), "base": requests_of(rows, sampling, adapted=False)}
    best = dict.fromkeys(sides, 0.0)
    for _ in range(rounds):
        for name, requests in sides.items():
            engine.clear_prefix_cache()
            start = time.perf_counter()
            engine.generate(requests)
            best[name] = max(best[name], len(rows) * TIMED_TOKENS / (time.perf_counter() - start))
    return best


def judge(model: MultiLoraModel, data: Path, name: str, limit: int) -> list[Score]:
    """The scores of base model, adapter and mixture on the domain's first held-out questions."""
    return evaluate(model, read_questions(data / name / "test.jsonl", limit), [None, name, MIXTURE])


def answers(rows: list[DemoRow], results: list[RequestResult]) -> RenderableType:
    """Every prompt in a line, and below it its rows: what each shows, its adapters, what it said, if rightly."""
    parts: list[RenderableType] = []
    for prompt, group in groupby(zip(rows, results, strict=True), key=lambda pair: pair[0].prompt):
        pairs = list(group)
        truth = pairs[-1][0].truth if pairs[-1][0].begins and pairs[-1][0].truth != REFUSAL else None
        end = f"  ({truth})" if truth else ""
        parts.append(Text.assemble("\n", (shortened(prompt, WIDTH - len(end)), "bold"), (end, "dim")))
        table = Table.grid(padding=(0, 1))
        for width in (1, 8, 26, WIDTH - 42):
            table.add_column(width=width, no_wrap=True, overflow="ellipsis")
        for row, result in pairs:
            text = " ".join(result.text.split())
            if row.truth and not row.begins:
                text = shortened(text, WIDTH - 42)
            mark, style = {True: ("✓", "green"), False: ("✗", "yellow"), None: (" ", "")}[row.is_right(text)]
            name = row.adapters or "none"
            table.add_row(Text(mark, style), Text(row.shows, "dim"), Text(name, "cyan"), Text(text, style))
        parts.append(Padding(table, (0, 0, 0, 2)))
    return Group(*parts, "")


def shortened(text: str, most: int) -> str:
    """The text, without its middle where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    start = most // 3
    return f"{text[:start].rstrip()} … {text[-(most - start - 3) :].lstrip()}"


def quality_table(scores: dict[str, list[Score]]) -> Table:
    """Held-out exact match of every adapter and of the mixture beside the base model's."""
    table = Table(box=SIMPLE_HEAD, title="  Held-out questions answered exactly right", title_justify="left")
    table.add_column("domain", style="cyan")
    for column in ("questions", "base", "base, labels only", "its adapter", "mixture"):
        table.add_column(column, justify="right")
    for name, (base, own, mixed) in scores.items():
        shares = (base.exact, base.among_labels, own.exact, mixed.exact)
        table.add_row(name, str(own.num_questions), *(f"{share:.2f}" for share in shares))
    return table
