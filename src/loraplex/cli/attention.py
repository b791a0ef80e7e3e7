"""`loraplex attention`: what rows attend to, as pictures and a page."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loraplex.cli.options import Device, Dtype, Layers, Load, Model, Raw, load_adapters, numbers
from loraplex.errors import RequestError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.text.prompts import as_chat
from loraplex.residual.capture import AttentionCapture, CaptureRequest
from loraplex.residual.registry import AttentionRequest
from loraplex.residual.steering import Span, Steering, spans_of_ranges, unmark
from loraplex.viz.attention_page import write_page
from loraplex.viz.attention_pictures import plot_compared, plot_heads, plot_residual_norms, plot_text


def attention(
    prompt: Annotated[str, typer.Option(help="The text; <<marks>> name the spans that are steered.")],
    model: Model = "smollm2-135m",
    load: Load = [],  # noqa: B006
    adapters: Annotated[list[str], typer.Option(help='A row\'s adapters: "none", "a", "a:0.7+b:0.3"; repeat.')] = [],  # noqa: B006
    strength: Annotated[
        list[float], typer.Option(help="One more row for each: the marked spans' attention times this; repeat.")
    ] = [],  # noqa: B006
    share: Annotated[
        list[float], typer.Option(help="One more row for each: the marked spans get at least this share; repeat.")
    ] = [],  # noqa: B006
    layers: Layers = None,
    heads: Annotated[str | None, typer.Option(help="Heads, in the same way; default all.")] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Generate so many tokens; 0 only reads the prompt.")] = 0,
    raw: Raw = False,
    output: Annotated[Path, typer.Option(help="Folder for the PNG files and attention.html.")] = Path("attention"),
    budget_mib: Annotated[int, typer.Option(min=1, help="Memory for one row's capture.")] = 256,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Run the prompt once for each --adapters, --strength and --share, and draw what each row attends to."""
    multi = MultiLoraModel.from_pretrained(model, dtype=dtype, device=device)
    load_adapters(multi, load)
    text, ranges = unmark(prompt)
    if (strength or share) and not ranges:
        needing = "--strength needs" if strength else "--share needs"
        raise RequestError(f"{needing} spans to steer. Mark them in the prompt: 'Use only <<this passage>>'.")
    spans, tokens = encode(multi, text, ranges, raw=raw)
    rows: list[tuple[str, str, Steering | None]] = [(choice, choice, None) for choice in adapters or ["none"]]
    first = rows[0][0]
    rows += [(first, f"{first}, strength {own:g}", Steering(spans=spans, strength=own)) for own in strength]
    rows += [(first, f"{first}, share {own:g}", Steering(spans=spans, share=own)) for own in share]
    capture = CaptureRequest(layers=numbers(layers), heads=numbers(heads), budget_bytes=budget_mib * 2**20)
    request = AttentionRequest(capture=capture, steering=[steering for _, _, steering in rows])
    batch = multi.tokenizer.pad({"input_ids": [tokens] * len(rows)}, return_tensors="pt").to(multi.base.device)
    choices = [None if choice == "none" else choice for choice, _, _ in rows]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if max_tokens:
        options = {"max_new_tokens": max_tokens, "do_sample": False}
        multi.generate(ids, mask, adapters=choices, attention=request, **options)  # type: ignore[arg-type]
    else:
        multi(ids, mask, adapters=choices, attention=request, use_cache=False)
    captures = [found for found in request.captures if found is not None]
    labels = [label for _, label, _ in rows]
    for path in draw(captures, labels, output):
        Console(highlight=False).print(str(path), soft_wrap=True)


def draw(captures: list[AttentionCapture], labels: list[str], output: Path) -> list[Path]:
    """Write every picture that the captures give, and the page; returns the files."""
    paths = [output / "attention.html", output / "text.png"]
    write_page(captures, labels, paths[0], title="Attention: " + "; ".join(labels))
    plot_text(captures, labels, paths[1])
    for number, (capture, label) in enumerate(zip(captures, labels, strict=True)):
        layer = capture.layers[len(capture.layers) // 2]
        paths.append(output / f"heads_{number}.png")
        plot_heads(capture, layer, paths[-1], title=f"{label}: attention of layer {layer}")
        if capture.residual_norms is not None:
            paths.append(output / f"residual_{number}.png")
            plot_residual_norms(capture, paths[-1], title=f"{label}: residuals by layer and token")
        if number > 0:
            paths.append(output / f"changed_{number}.png")
            plot_compared(captures[0], capture, paths[-1], labels=(labels[0], label))
    return paths


def encode(
    model: MultiLoraModel, text: str, ranges: tuple[tuple[int, int], ...], *, raw: bool
) -> tuple[tuple[Span, ...], list[int]]:
    """A prompt's tokens, and the spans of its marked characters; as a user's turn unless `raw`."""
    whole = text if raw else as_chat(model.tokenizer, text)
    start = whole.find(text)
    if start < 0:
        raise RequestError(
            "the chat template changes the prompt's text, so marked spans can't be found in it. Use --raw."
        )
    moved = [(first + start, last + start) for first, last in ranges]
    spans = spans_of_ranges(model.tokenizer, whole, moved, add_special_tokens=raw) if moved else ()
    return spans, list(model.tokenizer(whole, add_special_tokens=raw)["input_ids"])
