"""`loraplex scalings`: what a mixture's head predicts while it answers, as pictures and files."""

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loraplex.cli.options import Device, Dtype, Model, Raw, named_values
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.text.prompts import encode_prompts
from loraplex.viz.scalings_animation import animate_tokens
from loraplex.viz.scalings_plots import plot_layer_means, plot_token_heatmap
from loraplex.viz.scalings_text import plot_text_view
from loraplex.xlora.scalings.file import write_scalings
from loraplex.xlora.scalings.row_scalings import RowScalings

MIXTURE = "mixture"


def scalings(
    prompt: Annotated[list[str], typer.Option(help="A prompt to answer; repeat for several.")],
    mixture: Annotated[str, typer.Option(help="Folder or hub id of an X-LoRA mixture.")],
    output: Annotated[Path, typer.Option(help="Folder for the pictures and the scalings themselves.")],
    model: Model = "smollm2-135m",
    expert: Annotated[
        list[str], typer.Option(help="NAME=FOLDER of an expert, in head order, if not the mixture's own; repeat.")
    ] = [],  # noqa: B006
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 64,
    animate: Annotated[bool, typer.Option(help="Also write a GIF, a frame a token.")] = True,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
) -> None:
    """Answer prompts through a mixture and draw the scalings of every token."""
    console = Console()
    multi = MultiLoraModel.from_pretrained(model, dtype=dtype, device=device)
    experts = named_values(expert, "--expert")
    multi.load_mixture(MIXTURE, mixture, experts=experts or None)
    rows = answer(multi, prompt, max_tokens=max_tokens, chat=not raw)
    write_scalings(rows, output / "scalings.safetensors")
    with console.status("drawing ..."):
        files = draw(multi, rows, output, animate=animate)
    console.print(summary(multi, rows))
    console.print(f"written to {output}: scalings.safetensors, {', '.join(file.name for file in files)}")


def answer(model: MultiLoraModel, prompts: list[str], *, max_tokens: int, chat: bool) -> list[RowScalings]:
    """The scalings of every prompt and its answer."""
    encoded = encode_prompts(model.tokenizer, prompts, chat=chat).to(model.base.device)
    _, found = model.generate(
        encoded["input_ids"],
        encoded["attention_mask"],
        adapters=[MIXTURE] * len(prompts),
        max_new_tokens=max_tokens,
        do_sample=False,
        return_scalings=True,
    )
    return [scalings for row in found for scalings in row]


def draw(model: MultiLoraModel, rows: list[RowScalings], output: Path, *, animate: bool) -> list[Path]:
    """Heat map, text view and animation of each row, and the mean of all by layer."""
    files = []
    for i, row in enumerate(rows):
        tokens = [str(model.tokenizer.decode([token])) for token in row.token_ids]
        drawings = {f"tokens-{i}.png": plot_token_heatmap, f"text-{i}.png": plot_text_view}
        if animate:
            drawings[f"tokens-{i}.gif"] = animate_tokens
        for name, plot in drawings.items():
            plot(row, tokens, output / name)
            files.append(output / name)
    plot_layer_means(rows, output / "layers.png")
    return [*files, output / "layers.png"]


def summary(model: MultiLoraModel, rows: list[RowScalings]) -> Table:
    """The mean scaling of every expert over each row, beside the end of its text."""
    table = Table(box=SIMPLE_HEAD, title="Mean scaling over tokens and LoRA layers", title_justify="left")
    table.add_column("text", ratio=1)
    for name in rows[0].experts:
        table.add_column(name.removeprefix(f"{MIXTURE}/"), justify="right", no_wrap=True)
    for row in rows:
        text = str(model.tokenizer.decode(list(row.token_ids), skip_special_tokens=True)).strip()
        means = row.mean_by_expert().tolist()
        best = max(means)
        cells = [f"[bold]{mean:.2f}[/]" if mean == best else f"{mean:.2f}" for mean in means]
        table.add_row(text[-200:].replace("[", "\\["), *cells)
    return table
