"""Options that several commands have, as tables: a command takes whole groups of them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import typer

from loraplex.cli.help import sections

Function = TypeVar("Function", bound=Callable[..., Any])


class Flag(NamedTuple):
    """An option of a command."""

    name: str
    kind: Any  # its type; one that is annotated with an option is taken as it is
    default: Any
    help: str = ""

    def parameter(self) -> inspect.Parameter:
        """As typer takes it."""
        kind = Annotated[self.kind, typer.Option(help=self.help)] if self.help else self.kind
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=kind)


class JobFlag(NamedTuple):
    """An option of jobs: a value for all of them, or NAME=VALUE for one; given as text, and read afterwards."""

    name: str
    help: str
    default: Any = None  # for the help alone; None: `help` tells it, or there is none

    def parameter(self) -> inspect.Parameter:
        """As typer takes it."""
        told = self.help if self.default is None else f"{self.help.removesuffix('.')}; default {self.default}."
        option = typer.Option(metavar="[NAME=]VALUE", help=told, show_default=False)
        kind = Annotated[list[str] | None, option]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


@dataclass(frozen=True)
class FlagGroup:
    """Options under one heading of the help page."""

    title: str
    options: Sequence[Flag | JobFlag]


def settings_of(options: Sequence[Flag]) -> list[JobFlag]:
    """The same options as those of jobs."""
    return [JobFlag(option.name, option.help, option.default) for option in options]


def takes(first: str, *groups: FlagGroup) -> Callable[[Function], Function]:
    """Give a command the groups' options behind those that its function names, which stand under `first`.

    The function gets them as keywords, in a last parameter `**options`.
    """

    def extend(function: Function) -> Function:
        *named, _ = inspect.signature(function).parameters.values()
        added = [option.parameter() for group in groups for option in group.options]
        function.__signature__ = inspect.Signature([*named, *added], return_annotation=None)  # type: ignore[attr-defined]
        titles = {group.options[0].name: group.title for group in groups}
        heading = next(parameter.name for parameter in named if parameter.annotation is not typer.Context)
        return sections(**{heading: first}, **titles)(function)

    return extend
