"""`loraplex key`: make, list and revoke API keys."""

from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli.help import Command, make_group
from loraplex.server.auth.keys import TINKER_PREFIX, KeyFile

key_app = make_group("Make, list and revoke API keys of `loraplex serve`.")

KeysFile = Annotated[Path, typer.Option("--keys-file", help="The file of keys.")]

RequestsPerMinute = Annotated[
    int | None,
    typer.Option(min=1, show_default=False, help="Requests that it may send in a minute. By default no limit."),
]
TokensPerMinute = Annotated[
    int | None,
    typer.Option(min=1, show_default=False, help="Tokens, read and written, in a minute. By default no limit."),
]
MaxConcurrent = Annotated[
    int | None,
    typer.Option(min=1, show_default=False, help="Requests of it that may be open at once. By default no limit."),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, show_default=False, help="New tokens of an answer at most. By default no limit.")
]
MaxTrainingRuns = Annotated[
    int | None,
    typer.Option(min=1, show_default=False, help="Training runs of it that may be open at once. By default no limit."),
]


@key_app.command(cls=Command)
def create(
    keys_file: KeysFile,
    note: Annotated[str, typer.Option(help="Whose key it is.")] = "",
    use: Annotated[list[str] | None, typer.Option(help="Pattern of names that it may use; repeat. Default: *")] = None,
    load: Annotated[list[str] | None, typer.Option(help="Pattern of names that it may load; repeat.")] = None,
    root: Annotated[
        list[str] | None,
        typer.Option(help="Folder below which it may load, absolute or in an adapter root of the server; repeat."),
    ] = None,
    manage: Annotated[bool, typer.Option("--manage", help="It may use, load and see everything.")] = False,
    base: Annotated[bool, typer.Option("--base/--no-base", help="It may use the base model.")] = True,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    max_concurrent: MaxConcurrent = None,
    max_new_tokens: MaxNewTokens = None,
    max_training_runs: MaxTrainingRuns = None,
    max_priority: Annotated[int, typer.Option(help="Highest priority that it may ask for.")] = 0,
    shared_prefixes: Annotated[
        bool, typer.Option("--shared-prefixes", help="Share the prefix cache with other such keys.")
    ] = False,
    tml: Annotated[
        bool, typer.Option("--tml", help="Print it as the Tinker SDK takes it: with 'tml-' before it.")
    ] = False,
) -> None:
    """Make a key and print it: it is not kept anywhere, and can't be shown again."""
    key, record = KeyFile(keys_file).create(
        note=note,
        use=("*",) if use is None else tuple(use),
        load=tuple(load or ()),
        roots=tuple(root or ()),
        manage=manage,
        base=base,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
        max_new_tokens=max_new_tokens,
        max_training_runs=max_training_runs,
        max_priority=max_priority,
        shared_prefixes=shared_prefixes,
    )
    typer.echo(f"{TINKER_PREFIX}{key}" if tml else key)
    typer.echo(f"key {record.id} was added to {keys_file}", err=True)


@key_app.command("list", cls=Command)
def list_keys(keys_file: KeysFile) -> None:
    """Print what every key may do, as JSON lines; never the keys or their hashes."""
    for record in KeyFile(keys_file).records():
        typer.echo(record.model_dump_json(exclude={"salt", "hash"}))


@key_app.command(cls=Command)
def revoke(key_id: Annotated[str, typer.Argument(help="Its id, as `list` shows it.")], keys_file: KeysFile) -> None:
    """Make a key invalid; a running server sees it within a second."""
    record = KeyFile(keys_file).revoke(key_id)
    typer.echo(f"key {record.id} was removed from {keys_file}")
