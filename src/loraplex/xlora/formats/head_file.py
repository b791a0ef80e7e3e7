"""Read a scaling head from a safetensors file, checked before its tensors are read."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from loraplex.adapters.finite import require_finite
from loraplex.adapters.tensor_file import open_tensor_file
from loraplex.errors import AdapterFormatError, UnsupportedAdapterError
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.formats.head_tensors import check_head_shapes, count_layers, head_shapes

HeadCheck = Callable[[XLoraConfig, int, int, int], None]  # hidden size, experts, LoRA layers


def read_head(
    file: Path,
    config: XLoraConfig,
    *,
    hidden_size: int,
    num_experts: int,
    file_name: Callable[[str], str],
    why_missing: Callable[[list[str]], str],
    check: HeadCheck | None = None,
) -> tuple[dict[str, Tensor], int | None]:
    """The head's tensors under ScalingHead's names, and the number of LoRA layers if the head tells.

    `file_name` gives a tensor's name in the file. Raises AdapterFormatError (truncated file, missing, extra or
    misshaped tensors, NaN) and UnsupportedAdapterError (not floating point).
    """
    # One LoRA layer will do: only the names are needed here.
    ours = head_shapes(config, hidden_size=hidden_size, num_experts=num_experts, num_layers=1)
    names = {file_name(name): name for name in ours}
    with open_tensor_file(file) as tensors:
        shapes = {names.get(name, name): entry.shape for name, entry in tensors.entries.items()}
        num_layers = count_layers(shapes, config, num_experts, str(file))
        check_head_shapes(
            shapes,
            config,
            hidden_size=hidden_size,
            num_experts=num_experts,
            num_layers=num_layers or 1,
            where=str(file),
            file_name=lambda name: file_name(name) if name in ours else name,
            why_missing=why_missing,
        )
        if check is not None:
            check(config, hidden_size, num_experts, num_layers or 1)
        head = {ours_name: tensors.read(name) for name, ours_name in names.items()}
    for name, tensor in head.items():
        require_finite(tensor, f"{file}: {file_name(name)!r}")
    return head, num_layers


def require_head_file(file: Path, pickles: tuple[str, ...]) -> None:
    """Raise unless `file` exists; a pickle file in its place is refused by name."""
    if file.is_file():
        return
    for pickle in pickles:
        if (file.parent / pickle).is_file():
            raise UnsupportedAdapterError(
                f"{str(file.parent)!r} has its scaling head in a pickle file ({pickle!r}), which can run code when it "
                "is read. Convert it where you trust it: "
                f"safetensors.torch.save_file(torch.load({pickle!r}, weights_only=True), {file.name!r})."
            )
    raise AdapterFormatError(
        f"{str(file.parent)!r} has no {file.name}, which holds the scaling head. Copy or download it again."
    )
