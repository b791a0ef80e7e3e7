"""Commands that are imported when they are run: `loraplex --help` loads no model library."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand

from loraplex.cli.errors import quiet_libraries
from loraplex.cli.help import Command, CommandGroup


class LazyCommand(TyperCommand):
    """Stands for a command, or a group of them, in the list of its parent."""

    def __init__(self, name: str, help: str, target: str) -> None:
        super().__init__(name, help=help)
        self._target = target  # module:attribute, of a function or a Typer

    def load(self) -> Any:
        """The command itself."""
        module, _, attribute = self._target.partition(":")
        found = getattr(import_module(module), attribute)
        quiet_libraries()
        if isinstance(found, typer.Typer):
            return typer.main.get_command(found)
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(self.name, cls=Command)(found)
        return typer.main.get_command(alone)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Load the command, and let it read its own arguments."""
        return self.load().make_context(info_name, args, parent, **extra)


def lazy_group(commands: Mapping[str, tuple[str, str]]) -> type[CommandGroup]:
    """A group of commands by name, each with its line of help and its module:attribute."""

    class LazyGroup(CommandGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.commands = {name: LazyCommand(name, *command) for name, command in commands.items()}

    return LazyGroup
