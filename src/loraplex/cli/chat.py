"""`loraplex chat`: a conversation with a model, here or on a server."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loraplex.cli.chatting.session import Session
from loraplex.cli.chatting.terminal import Terminal
from loraplex.cli.chatting.turns import BASE, ChatModel
from loraplex.cli.help import sections
from loraplex.cli.options import ApiKey, Device, Dtype, Load, LoadAll, LoadMixture, Model, Weights
from loraplex.cli.sampling import MaxTokens, MinP, SamplingSeed, Stop, System, Temperature, TopK, TopP, given_sampling
from loraplex.environment import cache_folder
from loraplex.errors import ConfigError

_HISTORY = "chat_history"
_LOCAL = ("model", "load", "load_all", "load_mixture", "dtype", "device", "weights")


@sections(model="A model here", url="A server", adapters="The conversation", max_tokens="Sampling")
def chat(
    context: typer.Context,
    model: Model = "smollm2-135m",
    load: Load = [],  # noqa: B006
    load_all: LoadAll = None,
    load_mixture: LoadMixture = [],  # noqa: B006
    dtype: Dtype = "auto",
    device: Device = "cpu",
    weights: Weights = "auto",
    url: Annotated[
        str | None, typer.Option(help="Address of a server with OpenAI's API, in the place of a model here.")
    ] = None,
    api_key: ApiKey = None,
    served_name: Annotated[
        str | None, typer.Option(help="What the server calls the base model; by default it is asked.")
    ] = None,
    adapters: Annotated[
        str, typer.Option(help='Adapters to begin with: "none", "a", "a:0.7+b:0.3", "auto"; /adapters changes them.')
    ] = BASE,
    system: System = None,
    history: Annotated[
        bool, typer.Option(help="Keep what is typed for the arrow keys of later chats, in the cache folder.")
    ] = True,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: SamplingSeed = None,
    stop: Stop = [],  # noqa: B006
) -> None:
    """Talk to a model through adapters that you switch as you go, here or on a server.

    /help lists the commands. Without a terminal, the lines of standard input are the questions.
    """
    options = given_sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop
    )
    terminal = Terminal(cache_folder() / _HISTORY if history else None)
    talker = _remote(context, url, api_key, served_name) if url is not None else _local(context.params, options)
    try:
        terminal.tell(f"{talker.title}. /help lists the commands.")
        with terminal.editing():
            num_failed = Session(talker, terminal, adapters=adapters, system=system, options=options).run()
    finally:
        talker.close()
    if num_failed and not terminal.is_interactive:
        raise typer.Exit(1)


def _remote(context: typer.Context, url: str, api_key: str | None, served_name: str | None) -> ChatModel:
    from loraplex.cli.chatting.remote import RemoteChat

    for name in _LOCAL:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"--{name.replace('_', '-')} is for a model here, but --url names a server. Leave it out."
            )
    return RemoteChat(url, api_key=api_key, model=served_name)


def _local(given: dict[str, Any], options: dict[str, Any]) -> ChatModel:
    # Seconds of imports, which a chat with a server doesn't need.
    from loraplex.cli.chatting.local import LocalChat
    from loraplex.cli.errors import quiet_libraries
    from loraplex.cli.options import load_named
    from loraplex.engine.sampling.params import SamplingParams
    from loraplex.models.multi_lora import MultiLoraModel

    quiet_libraries()
    SamplingParams(**options)  # refused before the model is loaded
    model = MultiLoraModel.from_pretrained(
        given["model"], dtype=given["dtype"], device=given["device"], weights=given["weights"]
    )
    load_named(model, given["load"], given["load_all"], given["load_mixture"])
    return LocalChat(model, str(Path(given["model"]).name))
