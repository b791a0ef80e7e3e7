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
from loraplex.cli.help import Command, make_group, sections
from loraplex.cli.job_options import READERS, Settings, make_job, merge_options, read_job_file
from loraplex.cli.options import Model, Weights, results_table
from loraplex.cli.train_mixture import mixture
from loraplex.cli.yaml_jobs import read_yaml_jobs
from loraplex.errors import TrainingError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.training import TrainConfig, TrainResult, train_adapters

train_app = make_group("Train adapters, or mixtures of them, on a frozen base model.")

Setting = list[str] | None


def _setting(text: str) -> Any:
    return typer.Option(metavar="[NAME=]VALUE", help=text, show_default=False)


@train_app.callback()
def train() -> None:
    """Train adapters, or mixtures of them, on a frozen base model."""
    _log_to_terminal()


train_app.command(cls=Command)(mixture)


@train_app.command(cls=Command)
@sections(
    model="Data and output",
    kind="Adapters",
    loss="Loss",
    learning_rate="Optimization",
    patience="Evaluation",
    start="Where they begin",
    dtype="How it is computed",
)
def adapters(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for adapters, logs, plots and the checkpoint.")],
    data: Annotated[Setting, typer.Option(help="NAME=FILE of JSON lines; once for each adapter.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML or YAML file with a table for each job.")] = None,
    eval_data: Annotated[Setting, typer.Option(help="NAME=FILE of held-out records.")] = None,
    kind: Annotated[Setting, _setting("lora (default), residual: a linked residual, or loreft.")] = None,
    layers: Annotated[Setting, _setting("Of residuals and LoReFT: layers such as 0,8-10; default all.")] = None,
    positions: Annotated[Setting, _setting("Of LoReFT: tokens of the prompt such as l1 or f7+l7 (default).")] = None,
    rank: Annotated[Setting, _setting("Rank of the adapter; default 16, of LoReFT 4.")] = None,
    alpha: Annotated[Setting, _setting("LoRA alpha; default twice the rank.")] = None,
    targets: Annotated[Setting, _setting("Modules, joined by commas; default q,k,v,o_proj.")] = None,
    dropout: Annotated[Setting, _setting("LoRA dropout; default 0.")] = None,
    dora: Annotated[Setting, _setting("true: DoRA, a magnitude for each output besides.")] = None,
    rslora: Annotated[Setting, _setting("true: rsLoRA, the LoRA scaling alpha/sqrt(rank).")] = None,
    loss: Annotated[Setting, _setting("cross_entropy (default), reward, or dpo: of chosen and rejected.")] = None,
    dpo_beta: Annotated[Setting, _setting("How strongly DPO keeps to the first weights; default 0.1.")] = None,
    turns: Annotated[Setting, _setting("Assistant turns that count: all (default) or last.")] = None,
    learning_rate: Annotated[Setting, _setting("Learning rate of AdamW; default 0.001.")] = None,
    lora_plus_ratio: Annotated[Setting, _setting("LoRA+: learning rate of B over that of A; default 1.")] = None,
    schedule: Annotated[
        Setting, _setting("Learning rate over the steps: constant, linear or cosine (default).")
    ] = None,
    warmup_steps: Annotated[Setting, _setting("Steps in which the learning rate rises from 0; default 0.")] = None,
    weight_decay: Annotated[Setting, _setting("Weight decay of AdamW; default 0.")] = None,
    max_grad_norm: Annotated[Setting, _setting("Clip gradients to this norm; default 1; none: don't.")] = None,
    steps: Annotated[Setting, _setting("Optimizer steps; default 300.")] = None,
    epochs: Annotated[Setting, _setting("Epochs instead of steps.")] = None,
    batch_size: Annotated[Setting, _setting("Records of one micro-batch; default 16.")] = None,
    gradient_accumulation: Annotated[Setting, _setting("Micro-batches of a step; default 1.")] = None,
    seed: Annotated[Setting, _setting("Seed of the first weights, the data's order and dropout; default 0.")] = None,
    max_length: Annotated[
        Setting, _setting("Tokens of a record at most; longer ones lose the first; default 512.")
    ] = None,
    patience: Annotated[Setting, _setting("Evaluations without gain before a job stops.")] = None,
    eval_every: Annotated[Setting, _setting("Steps between evaluations; default 50.")] = None,
    eval_fraction: Annotated[
        Setting, _setting("Share of the records that is held out, without --eval-data; default 0.1.")
    ] = None,
    eval_records: Annotated[Setting, _setting("Records that are evaluated at most; default 256.")] = None,
    keep_best: Annotated[Setting, _setting("true: write the weights of the best evaluation.")] = None,
    best_by: Annotated[Setting, _setting("What is best: loss (default) or exact_match.")] = None,
    start: Annotated[Setting, _setting("lora (default), pissa or olora: of the base model's own.")] = None,
    init_from: Annotated[Setting, _setting("Adapter folder to start from.")] = None,
    after: Annotated[
        Setting, _setting("Train as the last of a link: folders of adapters that stay as they are, such as a+b:0.5.")
    ] = None,
    gates_before_user: Annotated[
        Setting,
        _setting("For experts: the gate of the tokens before the user's turn, 0 to 1 (default), or dropout: either."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the base model: float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, or auto: accelerate's choice.")] = "auto",
    weights: Weights = "auto",
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    tokens_per_forward: Annotated[int, typer.Option(help="Largest forward pass, in padded tokens.")] = 1024,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Run layers again in the backward pass: less memory, more time.")
    ] = False,
    fsdp: Annotated[
        bool, typer.Option(help="Share the base model's weights out over the processes of accelerate launch.")
    ] = False,
    packing: Annotated[
        bool, typer.Option(help="Lay the records of a pass behind each other, without padding; exact.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="User or organization on the hub: each LoRA becomes its repository NAME.")
    ] = None,
    push_private: Annotated[bool, typer.Option(help="New repositories are private.")] = False,
    tracker: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb or mlflow gets the log's numbers; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in OUTPUT.")] = True,
    plots: Annotated[bool, typer.Option(help="Draw each job's losses.")] = True,
    prompt_centroids: Annotated[
        bool, typer.Option(help="Write beside each LoRA what its prompts look like, for adapters=auto.")
    ] = True,
) -> None:
    """Train many adapters at once, LoRAs, linked residuals and LoReFT: a job for each --data, all in one batch.

    [NAME=]VALUE: a VALUE is for all jobs, NAME=VALUE for one; repeat.
    """
    from_file = _read_jobs(config) if config is not None else {}
    # Settings of jobs are handled alike, by their names.
    settings = merge_options(from_file, {name: context.params[name] or () for name in READERS})
    jobs = [make_job(name, of_job, model) for name, of_job in settings.items()]
    train_config = TrainConfig(
        output=output,
        checkpoint_every=checkpoint_every,
        resume=resume,
        plots=plots,
        prompt_centroids=prompt_centroids,
        tokens_per_forward=tokens_per_forward,
        gradient_checkpointing=gradient_checkpointing,
        packing=packing,
        fsdp=fsdp,
        push_to_hub=push_to_hub,
        push_private=push_private,
        trackers=tuple(tracker or ()),
    )
    place = str(PartialState().device) if device == "auto" else device
    place = "cpu" if fsdp else place  # from where its shards go to the devices
    base = MultiLoraModel.from_pretrained(model, dtype=dtype, device=place, weights=weights)
    try:
        results: Sequence[TrainResult] = train_adapters(base, base.tokenizer, jobs=jobs, config=train_config)
    except TrainingError as error:  # the jobs that didn't diverge are done
        _print(error.results)
        raise
    _print(results)


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
