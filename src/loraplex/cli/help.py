"""Help pages as plain text: every flag whole at 80 columns, in sections where a command has many of them."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from loraplex.cli.wording import errors_in_flags

Function = TypeVar("Function", bound=Callable[..., Any])
_KINDS = {"str": "TEXT", "int": "INTEGER", "float": "FLOAT", "path": "PATH"}
_KIND = re.compile(r"<(?:list\[)?(\w+)(?: range)?\]?>")
_ATTRIBUTE = "help_sections"


def sections(**titles: str) -> Callable[[Function], Function]:
    """Head the options of a command: each title by the name of the first parameter below it."""

    def head(function: Function) -> Function:
        setattr(function, _ATTRIBUTE, titles)
        return function

    return head


def make_group(help: str, **settings: Any) -> typer.Typer:
    """A group of commands; add them with `group.command(cls=Command)`."""
    chosen: dict[str, Any] = {"no_args_is_help": True, "cls": CommandGroup} | settings
    return typer.Typer(help=help, add_completion=False, rich_markup_mode=None, **chosen)


class Command(TyperCommand):
    """A command whose options stand in sections, and whose errors name flags."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(self, ctx, formatter)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Options and arguments, as NAME or [NAME]."""
        pieces = super().collect_usage_pieces(ctx)
        return [piece if piece == "[OPTIONS]" else piece.upper().replace("{", "").replace("}", "") for piece in pieces]

    def invoke(self, ctx: Any) -> Any:
        with errors_in_flags(self.params):
            return super().invoke(ctx)


class CommandGroup(TyperGroup):
    """A group of commands, which is shown as they are."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """As the parent's, but with the whole line of each command."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, (command.help or "").partition("\n")[0]) for name, command in commands if command]
            )


def _write_options(command: Any, context: Any, formatter: Any) -> None:
    """Arguments, then options below their titles; a definition list gives a flag that is too long its own line."""
    titles = getattr(command.callback, _ATTRIBUTE, {})
    title, parts = "Options", {"Arguments": [], "Options": []}  # type: tuple[str, dict[str, list[tuple[str, str]]]]
    for parameter in command.get_params(context):
        title = titles.get(parameter.name, "Options" if parameter.name == "help" else title)
        record = parameter.get_help_record(context)
        if record is not None:
            where = "Arguments" if parameter.param_type_name == "argument" else title
            parts.setdefault(where, []).append((_flag(parameter, record[0]), _told(parameter, record[1])))
    parts["Options"] = parts.pop("Options")  # last, with --help
    for title, records in parts.items():
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


def _flag(parameter: Any, shown: str) -> str:
    """An option with what it takes, as TEXT or INTEGER; an argument as in the line of usage."""
    if parameter.param_type_name == "argument":
        return parameter.name.upper() + ("..." if parameter.nargs != 1 else "")
    return _KIND.sub(lambda match: _KINDS.get(match[1], match[1].upper()), shown)


def _told(parameter: Any, text: str) -> str:
    """What an option does; of a switch with two flags, whether it is on by default."""
    for flags, state in ((parameter.opts, "on"), (getattr(parameter, "secondary_opts", []), "off")):
        for flag in flags:
            text = text.replace(f"[default: {flag.lstrip('-')}]", f"[default: {state}]")
    return text
