"""`loraplex train`: adapters, many at once; mixtures are in train_mixture.py."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import PartialState
from rich.console import Console
from rich.logging import RichHandler

from loraplex.cli.errors import run
from loraplex.cli.flag_groups import takes
from loraplex.cli.help import Command, make_group
from loraplex.cli.job_options import READERS, Settings, make_job, merge_options, read_job_file
from loraplex.cli.options import Model, results_table
from loraplex.cli.train_mixture import mixture
from loraplex.cli.training_flags import ADAPTERS
from loraplex.cli.yaml_jobs import read_yaml_jobs
from loraplex.errors import TrainingError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.training import TrainConfig, TrainResult, train_adapters
from loraplex.training.core.config import option_names
from loraplex.training.core.distributed import join_processes

train_app = make_group("Train adapters, or mixtures of them, on a frozen base model.")


@train_app.callback()
def train() -> None:
    """Train adapters, or mixtures of them, on a frozen base model."""
    _log_to_terminal()


train_app.command(cls=Command)(mixture)


@train_app.command(cls=Command)
@takes("Data and output", *ADAPTERS)
def adapters(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for adapters, logs, plots and the checkpoint.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]VALUE", help="NAME=FILE of JSON lines, of each adapter.", show_default=False),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML or YAML file with a table for each job.")] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]VALUE", help="NAME=FILE of held-out records.", show_default=False),
    ] = None,
    **options: Any,
) -> None:
    """Train many adapters at once, LoRAs, linked residuals and LoReFT: a job for each --data, all in one batch.

    [NAME=]VALUE: a VALUE is for all jobs, NAME=VALUE for one; repeat.
    """
    from_file = _read_jobs(config) if config is not None else {}
    # Settings of jobs are handled alike, by their names.
    settings = merge_options(from_file, {name: context.params[name] or () for name in READERS})
    jobs = [make_job(name, of_job, model) for name, of_job in settings.items()]
    of_run = {name: value for name, value in options.items() if name in option_names(TrainConfig)}
    train_config = TrainConfig(output=output, trackers=tuple(options["tracker"] or ()), **of_run)
    place = _place(options["device"], fsdp=train_config.fsdp)
    base = MultiLoraModel.from_pretrained(model, dtype=options["dtype"], device=place, weights=options["weights"])
    try:
        results: Sequence[TrainResult] = train_adapters(base, base.tokenizer, jobs=jobs, config=train_config)
    except TrainingError as error:  # the jobs that didn't diverge are done
        _print(error.results)
        raise
    _print(results)


def _place(device: str, *, fsdp: bool) -> str:
    """Where the base model is loaded; one that is sharded goes from the machine's memory to accelerate's devices."""
    if not fsdp and device != "auto":
        return device
    own = join_processes(cpu=device == "cpu").device
    return "cpu" if fsdp else str(own)


def _read_jobs(path: Path) -> dict[str, Settings]:
    return read_yaml_jobs(path) if path.suffix in (".yaml", ".yml") else read_job_file(path)


def _print(results: Sequence[TrainResult]) -> None:
    if PartialState().is_main_process:
        Console().print(results_table("adapter", results))


def _log_to_terminal() -> None:
    logger = logging.getLogger("loraplex")
    if logger.handlers:
        return
    console = Console(stderr=True)
    handler: logging.Handler = RichHandler(console=console, show_path=False)
    if not console.is_terminal:  # a file, or a cluster's log: lines as they are
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


if __name__ == "__main__":
    run(train_app)
