"""The command `loraplex`."""

import typer

from loraplex.cli.attention import attention
from loraplex.cli.bench_engine import engine_app
from loraplex.cli.bench_serve import serve_load
from loraplex.cli.demo import demo
from loraplex.cli.errors import run
from loraplex.cli.generate import generate
from loraplex.cli.inspect import inspect
from loraplex.cli.key import key_app
from loraplex.cli.scalings import scalings
from loraplex.cli.serve import serve
from loraplex.cli.train import train_app
from loraplex.cli.vector import vector

bench_app = typer.Typer(no_args_is_help=True, help="Measure on this machine.")
bench_app.add_typer(engine_app, name="engine")
bench_app.command("serve")(serve_load)
cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="One frozen language model, any number of LoRA adapters, one forward pass.",
)
cli.command()(demo)
cli.command()(generate)
cli.command()(inspect)
cli.command()(scalings)
cli.command()(attention)
cli.command()(vector)
cli.command()(serve)
cli.add_typer(key_app, name="key")
cli.add_typer(train_app, name="train")
cli.add_typer(bench_app, name="bench")


def app() -> None:
    """The entry point: an error that loraplex raises on purpose is shown without a traceback."""
    run(cli)
