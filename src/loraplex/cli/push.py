"""`loraplex push`: an adapter's folder to the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from loraplex.adapters.peft.push import push_adapter


def push(
    folder: Annotated[Path, typer.Argument(help="An adapter's folder, with its model card.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it isn't there.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Upload an adapter and its model card to the Hugging Face hub, in one commit."""
    typer.echo(push_adapter(folder, repo, private=private, message=message))
