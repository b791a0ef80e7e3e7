"""`loraplex bench`: what can be measured on your own machine."""

import typer

from loraplex.cli.bench_engine import engine_app
from loraplex.cli.bench_serve import serve_load

bench_app = typer.Typer(no_args_is_help=True, help="Measure on this machine.")
bench_app.add_typer(engine_app, name="engine")
bench_app.command("serve")(serve_load)
