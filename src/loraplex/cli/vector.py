"""`loraplex vector`: a steering vector from pairs of contrasting prompts."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loraplex.cli.options import Device, Dtype, Layers, Model, Raw, numbers
from loraplex.errors import DatasetError
from loraplex.json_files import parse_json, read_lines
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.text.prompts import as_chat
from loraplex.residual.format import write_residual
from loraplex.residual.modules import SteeringVector
from loraplex.residual.other_formats.control_vector import SUFFIX, write_control_vector
from loraplex.residual.vectors import BATCH_SIZE, block_vector_from_pairs, vector_from_pairs


class SiteOption(StrEnum):
    ATTENTION = "attention"
    MLP = "mlp"
    BLOCK = "block"


class MethodOption(StrEnum):
    MEAN = "mean"
    PCA = "pca"
    PCA_CENTER = "pca-center"


def vector(
    pairs: Annotated[Path, typer.Argument(help='JSON lines: {"wanted": "...", "unwanted": "..."}.')],
    output: Annotated[
        Path, typer.Option(help="Folder of the steering vector, or a control vector NAME.gguf; it must not exist.")
    ],
    model: Model = "smollm2-135m",
    layers: Layers = None,
    site: Annotated[
        SiteOption | None,
        typer.Option(help="Whose output it is added to; default: block for a .gguf file, else attention."),
    ] = None,
    method: Annotated[
        MethodOption,
        typer.Option(help="mean: difference of the means; pca, pca-center: the main direction, of length 1."),
    ] = MethodOption.MEAN,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that run together.")] = BATCH_SIZE,
    raw: Raw = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Compute a steering vector for each layer from pairs of contrasting prompts."""
    texts = read_pairs(pairs)
    multi = MultiLoraModel.from_pretrained(model, dtype=dtype, device=device)
    if not raw:
        texts = [(as_chat(multi.tokenizer, wanted), as_chat(multi.tokenizer, unwanted)) for wanted, unwanted in texts]
    is_file = output.suffix == SUFFIX
    place = site or (SiteOption.BLOCK if is_file else SiteOption.ATTENTION)
    found = _vector(multi, texts, place, method, numbers(layers), batch_size)
    if is_file:
        write_control_vector(found, output, multi.base.config.model_type)
    else:
        write_residual(found, output)
    Console(highlight=False).print(f"{len(texts)} pairs, {len(found.vectors)} layers: {output}", soft_wrap=True)


def _vector(
    multi: MultiLoraModel,
    texts: list[tuple[str, str]],
    site: SiteOption,
    method: MethodOption,
    at: tuple[int, ...] | None,
    batch_size: int,
) -> SteeringVector:
    linked = multi.registry.linked
    if site is SiteOption.ATTENTION:
        return vector_from_pairs(
            multi.base, linked.layers, multi.tokenizer, texts, at=at, method=method.value, batch_size=batch_size
        )
    return block_vector_from_pairs(
        multi.base,
        linked.sites,
        linked.identity,
        multi.tokenizer,
        texts,
        site="mlp" if site is SiteOption.MLP else "block",
        at=at,
        method=method.value,
        batch_size=batch_size,
    )


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
