"""Read a mixture's folder, whichever of the known layouts it has."""

from collections.abc import Sequence
from pathlib import Path

from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.errors import AdapterFormatError
from loraplex.json_files import damaged_as, read_object
from loraplex.validation import listed
from loraplex.xlora.formats.head_file import HeadCheck
from loraplex.xlora.formats.mixture_folder import MixtureFolder
from loraplex.xlora.formats.original_layout import SETTINGS_FILE, read_original_layout
from loraplex.xlora.formats.peft_layout import PEFT_TYPE, read_peft_layout


def read_mixture_folder(
    folder: str | Path,
    *,
    find_experts: bool = True,
    check: HeadCheck | None = None,
    order: Sequence[str] | None = None,
) -> MixtureFolder:
    """Read settings and scaling head of the mixture in `folder`, and find its experts.

    The experts' weights are not read. `find_experts=False` is for experts that come from elsewhere: `experts`
    is left empty. `check` sees settings and sizes before the head is read, and may raise. `order` names the experts in
    the head's order, for early folders of the original package, which don't.

    Raises AdapterFormatError (files missing, damaged or not matching each
    other), UnsupportedAdapterError (settings or file formats that can't be honoured exactly) and
    AdapterNotFoundError (an expert is missing).
    """
    folder = Path(folder)
    with damaged_as(AdapterFormatError, folder):
        return _read(folder, find_experts, check, order)


def _read(folder: Path, find_experts: bool, check: HeadCheck | None, order: Sequence[str] | None) -> MixtureFolder:
    needed = (
        f"A mixture is a folder with {CONFIG_FILE} of peft_type {PEFT_TYPE!r} (PEFT's layout) or {SETTINGS_FILE} (the "
        "original package's)."
    )
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise AdapterFormatError(f"mixture folder {str(folder)!r} {what}. {needed}")
    has_peft, has_original = (folder / CONFIG_FILE).is_file(), (folder / SETTINGS_FILE).is_file()
    if has_original:
        # The original package leaves the adapter_config.json of an expert called "default" there.
        if has_peft and _is_peft_mixture(folder):
            raise AdapterFormatError(
                f"{str(folder)!r} holds two mixtures, {CONFIG_FILE} and {SETTINGS_FILE}. Remove the files of one."
            )
        return read_original_layout(folder, find_experts=find_experts, check=check, order=order)
    if has_peft:
        return read_peft_layout(folder, find_experts=find_experts, check=check)
    found = sorted(path.name for path in folder.iterdir())
    raise AdapterFormatError(f"mixture folder {str(folder)!r} has no settings; it holds [{listed(found)}]. {needed}")


def is_mixture_folder(folder: Path) -> bool:
    """Whether a folder holds a mixture, in PEFT's or the original package's layout. Raises AdapterFormatError."""
    with damaged_as(AdapterFormatError, folder):
        return (folder / SETTINGS_FILE).is_file() or ((folder / CONFIG_FILE).is_file() and _is_peft_mixture(folder))


def _is_peft_mixture(folder: Path) -> bool:
    return bool(read_object(folder / CONFIG_FILE, AdapterFormatError).get("peft_type") == PEFT_TYPE)
