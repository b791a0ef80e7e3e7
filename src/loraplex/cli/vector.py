"""`loraplex vector`: a steering vector from pairs of contrasting prompts."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loraplex.cli.options import Device, Dtype, Layers, Model, Raw, numbers
from loraplex.errors import DatasetError
from loraplex.json_files import parse_json, read_lines
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.prompts import as_chat
from loraplex.residual.format import write_residual
from loraplex.residual.vectors import vector_from_pairs


def vector(
    pairs: Annotated[Path, typer.Argument(help='JSON lines: {"wanted": "...", "unwanted": "..."}.')],
    output: Annotated[Path, typer.Option(help="Folder of the steering vector; it must not exist.")],
    model: Model = "smollm2-135m",
    layers: Layers = None,
    raw: Raw = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Compute a steering vector for each layer from pairs of contrasting prompts."""
    texts = read_pairs(pairs)
    multi = MultiLoraModel.from_pretrained(model, dtype=dtype, device=device)
    if not raw:
        texts = [(as_chat(multi.tokenizer, wanted), as_chat(multi.tokenizer, unwanted)) for wanted, unwanted in texts]
    found = vector_from_pairs(multi.base, multi.registry.linked.layers, multi.tokenizer, texts, at=numbers(layers))
    write_residual(found, output)
    Console(highlight=False).print(f"{len(texts)} pairs, {len(found.vectors)} layers: {output}", soft_wrap=True)


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Read contrasting texts. Raises DatasetError, which names file and line."""
    form = '{"wanted": "...", "unwanted": "..."}'
    try:
        lines = list(read_lines(path))
    except (OSError, ValueError) as error:
        raise DatasetError(f"the file of pairs {str(path)!r} can't be read: {error}.") from error
    pairs = []
    for number, line in lines:
        try:
            content = parse_json(line)
            pair = (content["wanted"], content["unwanted"])
        except (ValueError, KeyError, TypeError):
            raise DatasetError(f"{path}:{number} is not of the form {form}.") from None
        if not all(isinstance(text, str) for text in pair):
            raise DatasetError(f"{path}:{number} holds no texts; write {form}.")
        pairs.append(pair)
    if not pairs:
        raise DatasetError(f"the file of pairs {str(path)!r} is empty. Write one pair a line: {form}.")
    return pairs
