"""The adapters that a link names, found on disk or on the hub and told apart from what is no LoRA adapter."""

from collections.abc import Mapping
from pathlib import Path

from loraplex.adapters.peft.hub import resolve_adapter_folder
from loraplex.errors import AdapterFormatError, AdapterNotFoundError, RequestError, UnsupportedAdapterError
from loraplex.json_files import damaged_as
from loraplex.residual.sources import is_residual_source
from loraplex.routing.adapter_spec import AdapterSpec, Link, parse_adapter_spec
from loraplex.validation import listed
from loraplex.xlora.formats.folders import is_mixture_folder

CONTROL_VECTOR = ".gguf"


def parse_link(link: AdapterSpec, adapters: Mapping[str, str | Path]) -> Link:
    """The names and weights of a link of `adapters`, each of which it uses.

    Raises LinkSyntaxError, AdapterNotFoundError (a name without adapter) and RequestError (an empty link, or an adapter
    that it doesn't name).
    """
    pairs = parse_adapter_spec(link)
    if not pairs:
        raise RequestError("the link is None, the base model itself. Name at least one adapter, such as 'a:0.7+b:0.3'.")
    names = [name for name, _ in pairs]
    missing = [name for name in names if name not in adapters]
    if missing:
        raise AdapterNotFoundError(
            f"the link names {listed(missing)}, but the adapters given are {listed(adapters) or 'none'}. Give the "
            "folder of each."
        )
    unused = [name for name in adapters if name not in names]
    if unused:
        raise RequestError(f"the link {link!r} doesn't name {listed(unused)}. Leave these adapters out, or add them.")
    return pairs


def find_lora(name: str, path_or_id: str | Path, what: str) -> Path:
    """The folder of a LoRA adapter; `what` says what is made of it ("merged into weights").

    Raises UnsupportedAdapterError for mixtures and residuals, AdapterNotFoundError and AdapterFormatError.
    """
    if str(path_or_id).endswith(CONTROL_VECTOR):
        raise _no_weights(name, "a control vector", "adds to hidden states", what)
    with damaged_as(AdapterFormatError, path_or_id):
        folder = resolve_adapter_folder(path_or_id).absolute()
        if is_mixture_folder(folder):
            raise _no_weights(name, "a mixture", "weighs its experts anew for every token", what)
        if is_residual_source(folder):
            raise _no_weights(name, "a residual", "adds to hidden states what depends on attention", what)
    return folder


def _no_weights(name: str, kind: str, does: str, what: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"{name!r} is {kind}, which {does}: no weights of linear modules do the same, so it can't be {what}. Leave it "
        "out of the link, or serve it with the base model."
    )
