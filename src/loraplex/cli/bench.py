"""`loraplex bench`: what can be measured on your own machine."""

from loraplex.cli.bench_engine import engine_app
from loraplex.cli.bench_serve import serve_load
from loraplex.cli.help import Command, make_group

bench_app = make_group("Measure on this machine.")
bench_app.add_typer(engine_app, name="engine")
bench_app.command("serve", cls=Command)(serve_load)
