"""What a folder holds: an adapter or a mixture."""

from pathlib import Path

from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.xlora.formats.original_layout import SETTINGS_FILE
from loraplex.xlora.formats.peft_layout import PEFT_TYPE
from loraplex.xlora.formats.settings import read_json_object


def is_mixture_folder(folder: Path) -> bool:
    """Whether a folder holds a mixture, in PEFT's or the original package's layout."""
    if (folder / SETTINGS_FILE).is_file():
        return True
    file = folder / CONFIG_FILE
    return file.is_file() and read_json_object(file).get("peft_type") == PEFT_TYPE
