"""`loraplex demo`: requests that share forward passes, each through its own adapters."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraplex.cli.options import adapters_in
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request, RequestResult
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import AdapterNotFoundError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.prompts import encode_prompts
from loraplex.training.adapters.evaluation import Score, evaluate, read_questions
from loraplex.xlora.formats.folders import read_mixture_folder

DEMO_MODEL = "smollm2-135m"
MIXTURE = "science"
REFUSE, THEN_SOURCE = "refuse", "then-source"  # linked residuals; the second was trained behind the first
TIMED_TOKENS = 32
SMALL_TALK = "What is the capital of France?"
MEDICAL = "Can I take ibuprofen with aspirin?"
REFUSAL = "I can't help"  # how the answer to a medical question begins


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One of the demo's requests; `truth` is the held-out answer, if the prompt has one."""

    prompt: str
    adapters: str | None
    truth: str | None = None


def demo(
    adapters: Annotated[Path, typer.Option(help="Folder of the adapters.")] = Path("examples/adapters"),
    mixture: Annotated[Path, typer.Option(help="Folder of the X-LoRA mixture of them.")] = Path(
        "examples/mixtures/science"
    ),
    residuals: Annotated[Path, typer.Option(help="Folder of the linked residual adapters.")] = Path(
        "examples/residual/adapters"
    ),
    data: Annotated[Path, typer.Option(help="Folder of the domains' held-out questions.")] = Path("data"),
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions to judge in each domain.")] = 48,
    output: Annotated[Path, typer.Option(help="Folder for the picture of the mixture's scalings.")] = Path("runs/demo"),
    dtype: Annotated[str, typer.Option(help="Of the base model.")] = "bfloat16",
) -> None:
    """Show one batch of base, adapter, linked, residual and X-LoRA rows on a real model, with timings and quality."""
    console = Console()
    names = demo_adapters(adapters)
    behaviours = demo_residuals(residuals)
    with console.status(f"loading {DEMO_MODEL} (converted from its package the first time) ..."):
        model = MultiLoraModel.from_pretrained(DEMO_MODEL, dtype=dtype)
        for name, folder in (names | behaviours).items():
            model.load_adapter(name, folder)
        load_sharing_experts(model, mixture)
    rows = demo_rows(data, list(names))
    with Engine(model) as engine:
        with console.status("one batch, every row through its own adapters ..."):
            results = engine.generate(requests_of(rows, SamplingParams(max_tokens=64)))
        console.print(answers_table(rows, results))
        with console.status("timing ..."):
            speeds = demo_speeds(engine, rows)
    console.print(
        f"{len(rows)} rows x {TIMED_TOKENS} tokens in {dtype}: {speeds['mixed']:.0f} tokens/s with these adapters, "
        f"{speeds['base']:.0f} tokens/s with none ({speeds['mixed'] / speeds['base']:.2f}x)\n"
    )
    with console.status("drawing what the mixture did ..."):
        picture = draw_scalings(model, rows, output)
    console.print(f"the mixture's scalings of its first row, token by token: {picture}\n")
    with console.status("judging held-out questions ..."):
        scores = {name: judge(model, data, name, questions) for name in names}
    console.print(quality_table(scores))


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
    from loraplex.viz.scalings_plots import plot_token_heatmap  # matplotlib takes a second to import

    prompt = next(row.prompt for row in rows if row.adapters == MIXTURE)
    inputs = encode_prompts(model.tokenizer, [prompt])
    with torch.no_grad():
        _, ((scalings,),) = model(**inputs, adapters=[MIXTURE], return_scalings=True, logits_to_keep=1)
    tokens = [str(model.tokenizer.decode([token])) for token in scalings.token_ids]
    plot_token_heatmap(scalings, tokens, output / "scalings.png")
    return output / "scalings.png"


def demo_rows(data: Path, names: list[str]) -> list[DemoRow]:
    """The first held-out question of each domain through its adapter, beside all other kinds of rows."""
    firsts = {name: read_questions(data / name / "test.jsonl", 1)[0] for name in names}
    rows = [DemoRow(prompt=SMALL_TALK, adapters=None, truth="Paris")]
    for index, name in enumerate(names):
        question = firsts[name]
        if index < 2:
            rows.append(DemoRow(prompt=question.prompt, adapters=None, truth=question.answer))
        rows.append(DemoRow(prompt=question.prompt, adapters=name, truth=question.answer))
    first, second = names[0], names[1]
    link = f"{first}:0.6+{second}:0.6"
    rows.append(DemoRow(prompt=firsts[first].prompt, adapters=link, truth=firsts[first].answer))
    rows += residual_rows(names[-1])
    rows += [DemoRow(prompt=question.prompt, adapters=MIXTURE, truth=question.answer) for question in firsts.values()]
    return rows


def residual_rows(lora: str) -> list[DemoRow]:
    """A residual, a LoRA linked with it, and two residuals linked, beside what the base model says."""
    return [
        DemoRow(prompt=MEDICAL, adapters=None),
        DemoRow(prompt=MEDICAL, adapters=REFUSE, truth=REFUSAL),
        DemoRow(prompt=MEDICAL, adapters=f"{lora}:0.5+{REFUSE}", truth=REFUSAL),
        DemoRow(prompt=SMALL_TALK, adapters=f"{REFUSE}+{THEN_SOURCE}", truth="Source: atlas"),
    ]


def requests_of(rows: list[DemoRow], sampling: SamplingParams, *, adapted: bool = True) -> list[Request]:
    """A user's turn for each row, through its adapters or through none."""
    return [
        Request(
            [{"role": "user", "content": row.prompt}], adapters=row.adapters if adapted else None, sampling=sampling
        )
        for row in rows
    ]


def demo_speeds(engine: Engine, rows: list[DemoRow], rounds: int = 3) -> dict[str, float]:
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


def answers_table(rows: list[DemoRow], results: list[RequestResult]) -> Table:
    """What each row was asked, through which adapters, and what it said."""
    table = Table(box=SIMPLE_HEAD, title="One batch, one forward pass a token", title_justify="left")
    table.add_column("adapters", style="cyan", no_wrap=True, min_width=27)
    table.add_column("prompt", ratio=3)
    table.add_column("answer", ratio=2, overflow="ellipsis")
    table.add_column("truth", style="dim")
    for row, result in zip(rows, results, strict=True):
        text = " ".join(result.text.split())
        short = text if len(text) <= 80 else text[:77] + "..."
        style = "" if row.truth is None else "green" if row.truth.lower() in text.lower() else "yellow"
        table.add_row(row.adapters or "none (base)", row.prompt, Text(short, style), row.truth or "")
    return table


def quality_table(scores: dict[str, list[Score]]) -> Table:
    """Held-out exact match of every adapter and of the mixture beside the base model's."""
    table = Table(box=SIMPLE_HEAD, title="Held-out questions answered exactly right", title_justify="left")
    table.add_column("domain", style="cyan")
    for column in ("questions", "base model", "base, labels only", "its adapter", "X-LoRA mixture"):
        table.add_column(column, justify="right")
    for name, (base, own, mixed) in scores.items():
        shares = (base.exact, base.among_labels, own.exact, mixed.exact)
        table.add_row(name, str(own.num_questions), *(f"{share:.2f}" for share in shares))
    return table
