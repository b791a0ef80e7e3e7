"""Which folders a request's name or path stands for. Nothing outside of what the operator named is reached."""

import os
from pathlib import Path

from loraplex.adapters.leftovers import restore_replaced
from loraplex.errors import AdapterFormatError, AdapterNotFoundError, LinkSyntaxError, RequestError
from loraplex.residual.other_formats.control_vector import SUFFIX, is_gguf
from loraplex.routing.adapter_spec import Link, parse_adapter_spec
from loraplex.vllm_plugin.options import KEY, PluginOptions

# The folders of a link's adapters, mixtures and residuals, and the files of its control vectors, with their weights.
Wanted = tuple[tuple[Path, float], ...]


class FolderCatalog:
    """The adapters and mixtures of `PluginOptions.folder` and `PluginOptions.adapters`, by name."""

    def __init__(self, options: PluginOptions) -> None:
        self._root = Path(os.path.realpath(Path(os.path.expanduser(options.folder)))) if options.folder else None
        self._adapters = {name: Path(os.path.expanduser(folder)) for name, folder in options.adapters.items()}
        self._allows_any_path = options.allows_any_path

    def folder(self, name: str) -> Path:
        """The folder of one name, or the control vector NAME.gguf.

        Raises AdapterNotFoundError, and RequestError for a name that leads out.
        """
        if name in self._adapters:
            return self._adapters[name]
        if self._root is not None:
            folder = self._root / self._check_inside(name)
            restore_replaced(folder)
            if folder.is_dir() and self._is_inside(folder):
                self._check_contents(folder)
                return folder
            vector = folder.with_name(folder.name + SUFFIX)
            if is_gguf(vector) and self._is_inside(vector):
                return vector
        places = f"{KEY}.folder ({self._root}) and " if self._root is not None else ""
        raise AdapterNotFoundError(f"there is no adapter, mixture or residual {name!r} in {places}{KEY}.adapters.")

    def link(self, text: str) -> tuple[Link, Wanted]:
        """The link that a text writes, and its folders."""
        link = parse_adapter_spec(text)
        return link, tuple((self.folder(name), weight) for name, weight in link)

    def find(self, path: str) -> Wanted:
        """What a LoRARequest's path stands for: a folder, a control vector's file, or a link of names."""
        local = Path(os.path.expanduser(path))
        restore_replaced(local)
        if os.path.isdir(local) or is_gguf(local):
            self._check_allowed(local)
            return ((local, 1.0),)
        try:
            return self.link(path)[1]
        except (LinkSyntaxError, AdapterNotFoundError) as error:
            if os.path.isabs(path):
                raise AdapterNotFoundError(f"there is no folder {path!r}.") from None
            raise AdapterNotFoundError(f"{path!r} is neither a folder nor a link of known names: {error}") from None

    def check_expert(self, mixture: Path, expert: Path | str) -> Path:
        """The folder of a mixture's expert; where paths are limited it must be an allowed one."""
        if not isinstance(expert, Path):
            raise AdapterFormatError(
                f"the mixture in {str(mixture)!r} has the expert {expert!r}, a hub id. Inside vLLM every worker would "
                f"download it: download it once, and put it into the mixture's folder."
            )
        self._check_allowed(expert, inside=mixture)
        return expert

    def _check_allowed(self, folder: Path, inside: Path | None = None) -> None:
        if self._allows_any_path:
            return
        places = [*self._adapters.values(), *([] if self._root is None else [self._root])]
        places += [] if inside is None else [inside]
        real = os.path.realpath(folder)
        if not any(Path(real).is_relative_to(os.path.realpath(place)) for place in places):
            raise RequestError(
                f"{str(folder)!r} lies outside of {KEY}.folder and {KEY}.adapters, so it isn't loaded. Put it "
                f'there, or allow every path with {{"{KEY}": {{"any_path": true}}}}.'
            )

    def _check_inside(self, name: str) -> str:
        """A name is a path below the folder: no "..", no hidden part (what is half written begins with a dot)."""
        if name.startswith("/") or any(part.startswith(".") or not part for part in name.split("/")):
            raise RequestError(
                f"{name!r} can't name a folder: none of its parts may be empty or begin with a dot. Rename the folder."
            )
        return name

    def _is_inside(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return self._root is not None and real.is_relative_to(self._root) and real != self._root

    def _check_contents(self, folder: Path) -> None:
        """No file below a named folder may be a link to the outside."""
        for parent, folders, files in os.walk(folder):
            for name in (*folders, *files):
                if not self._is_inside(Path(parent, name)):
                    raise RequestError(f"{str(Path(parent, name))!r} leads out of {KEY}.folder, so it isn't read.")
