"""`loraplex chat`: conversations through adapters that are switched, here and with a server."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loraplex import Engine, MultiLoraModel, Request
from loraplex.cli.app import cli
from loraplex.cli.chatting.local import LocalChat, deferred_interrupt
from loraplex.cli.chatting.remote import RemoteChat
from loraplex.cli.chatting.session import Session
from loraplex.cli.chatting.terminal import Terminal, printable
from loraplex.cli.chatting.turns import BASE, ChatModel, Turn
from loraplex.environment import cache_folder
from loraplex.errors import ConfigError, RemoteError
from tests.cli.pseudo_terminal import Dialogue
from tests.server.tiny_server import Running, character_tokenizer, make_model, running, settings, write_adapters
from tests.tiny_models import tiny_model

NUM_TOKENS = 12
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS}


@pytest.fixture(autouse=True)
def interrupts_raise() -> Iterator[None]:
    """What runs in the background of a shell ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def local(root: Path) -> Iterator[LocalChat]:
    chat = LocalChat(make_model(root), "tiny")
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Running]:
    with running(make_model(root), settings(roots=(str(root),))) as server:
        yield server


class Script(Terminal):
    """A terminal that somebody types these lines into; what is shown and told is kept."""

    def __init__(self, *lines: str) -> None:
        super().__init__()
        self.is_interactive = True
        self._lines = iter(lines)
        self.prompts: list[str] = []
        self.shown: list[str] = []
        self.told: list[str] = []
        self.errors: list[str] = []

    def _line(self, prompt: str) -> str:
        self.prompts.append(prompt)
        try:
            return next(self._lines)
        except StopIteration:
            raise EOFError from None

    def show(self, text: str) -> None:
        self.shown.append(text)

    def tell(self, text: str) -> None:
        self.told.append(text)

    def tell_error(self, error: Exception) -> None:
        self.errors.append(str(error))

    @property
    def answers(self) -> list[str]:
        """Each ends with a piece that is the end of a line and nothing else."""
        found = [""]
        for piece in self.shown:
            if piece == "\n":
                found.append("")
            else:
                found[-1] += piece
        return found[:-1]


def hold(chat: ChatModel, *lines: str, system: str | None = None) -> Script:
    script = Script(*lines)
    Session(chat, script, adapters=BASE, system=system, options=dict(GREEDY)).run()
    return script


def answer(model: MultiLoraModel, messages: list[dict[str, str]], adapters: str | None) -> str:
    """By transformers' own loop, with the conversation as a whole, up to the end token."""
    inputs = model.encode_chat([messages])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "packed": False}
    options["eos_token_id"] = model.tokenizer.eos_token_id
    out = model.generate(**inputs, adapters=[adapters], **options)
    new = out[0, inputs["input_ids"].shape[1] :]
    return str(model.tokenizer.decode(new, skip_special_tokens=True)).strip()


def expected(model: MultiLoraModel, questions: list[tuple[str, str | None]], system: str | None) -> list[str]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for question, adapters in questions:
        messages.append({"role": "user", "content": question})
        answers.append(answer(model, messages, adapters))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_each_answer_is_that_of_the_whole_conversation_through_the_adapters_of_its_turn(
    local: LocalChat, root: Path
) -> None:
    questions = [("tell me", None), ("and more", "a"), ("again", "a:0.5+b"), ("last", "mix-ab")]
    lines = [line for question, choice in questions for line in (f"/adapters {choice or BASE}", question)]
    script = hold(local, *lines, system="be brief")
    assert script.errors == []
    found = expected(make_model(root), questions, "be brief")
    assert len(set(found)) == 4
    assert script.answers == found


def test_a_server_gives_what_the_model_here_gives(local: LocalChat, server: Running) -> None:
    lines = ("tell me", "/adapters a", "and more", "/adapters b:0.3", "/system be brief", "once more")
    remote = RemoteChat(server.url)
    try:
        script, here = hold(remote, *lines), hold(local, *lines)
    finally:
        remote.close()
    assert script.errors == []
    assert script.answers == here.answers
    assert script.prompts == ["none> "] * 2 + ["a> "] * 2 + ["b:0.3> "] * 3


def test_an_interrupt_ends_the_answer_and_nothing_else(local: LocalChat, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script("tell me", "and more")
    typed = False

    def show(self: Script, text: str) -> None:
        nonlocal typed
        self.shown.append(text)
        if not typed:
            typed = True
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Script, "show", show)
    options = {**GREEDY, "ignore_eos": True}
    session = Session(local, script, adapters=BASE, system=None, options=options)
    session.run()
    first, second = (message["content"] for message in session._messages[1::2])
    assert 0 < len(first) < len(second)
    assert "stopped" in script.told[0]
    # The conversation goes on from what was shown.
    messages = [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": first}]
    whole = "".join(
        piece.text
        for piece in local.answer(Turn(messages=[*messages, {"role": "user", "content": "and more"}], options=options))
    )
    assert second == whole.lstrip()


def test_an_interrupt_while_a_question_is_taken_leaves_nothing_behind(
    local: LocalChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Engine.add_request

    def interrupted(engine: Engine, request: Request) -> str:
        request_id = take(engine, request)
        signal.raise_signal(signal.SIGINT)
        return request_id

    monkeypatch.setattr(Engine, "add_request", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(local.answer(Turn(messages=[{"role": "user", "content": "tell me"}], options=GREEDY)))
    assert not local._engine.has_work


def test_an_interrupt_waits_for_the_end_of_a_step_and_a_second_one_does_not() -> None:
    done = []

    def step(interrupts: int) -> None:
        with deferred_interrupt():
            for _ in range(interrupts):
                signal.raise_signal(signal.SIGINT)
            done.append(interrupts)

    for interrupts in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            step(interrupts)
    step(0)
    assert done == [1, 0]


def test_several_lines_in_quotes_are_one_question(local: LocalChat, tmp_path: Path) -> None:
    script = hold(local, '"""one', "two", 'three"""', f"/save {tmp_path / 'chat.jsonl'}")
    assert script.prompts == ["none> ", "... ", "... ", "none> ", "none> "]
    (record,) = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert record["messages"][0] == {"role": "user", "content": "one\ntwo\nthree"}
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"]


def test_the_last_question_is_answered_anew_through_other_adapters(local: LocalChat, root: Path) -> None:
    script = hold(local, "tell me", "/adapters b", "/again")
    model = make_model(root)
    assert script.answers == [expected(model, [("tell me", name)], None)[0] for name in (None, "b")]


def test_a_question_that_cannot_be_answered_is_taken_back(local: LocalChat) -> None:
    script = hold(local, "x" * 4000, "tell me")
    assert "prompt has" in script.errors[0]
    assert script.answers == hold(local, "tell me").answers


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adapters nope", "'nope' is not loaded. There are: none, a, b, c"),
        ("/again", "no question yet"),
        ("/load here", "write /load NAME=FOLDER"),
        ("/set colour 3", "knows no 'colour'"),
        ("/set top_k many", "top_k is 'many'"),
        ("/dance", "no command /dance"),
    ],
)
def test_commands_say_what_is_wrong(local: LocalChat, line: str, message: str) -> None:
    script = hold(local, line)
    assert message in script.errors[0]
    assert script.shown == []


def test_options_hold_until_they_are_the_models_again(local: LocalChat) -> None:
    script = hold(local, "/set max_tokens 1", "tell me", "/set max_tokens default", "/clear", "tell me")
    assert script.errors == []
    short, long = script.answers
    assert len(short) == 1 < len(long)
    assert long.startswith(short)


def test_adapters_are_loaded_here_and_on_a_server(local: LocalChat, server: Running, root: Path) -> None:
    remote = RemoteChat(server.url)
    try:
        for chat, folder in ((local, root / "b"), (remote, "b")):
            script = hold(chat, f"/load more={folder}", "/adapters more", "tell me", "/adapters b", "/again")
            assert script.errors == []
            assert script.answers[0] == script.answers[1]
        assert "mix-ab" in remote.names()
        assert "tiny" not in remote.names()
    finally:
        remote.close()
        server.model.unload("more")


def test_a_server_that_is_not_there_or_refuses_is_an_error(server: Running) -> None:
    with pytest.raises(RemoteError, match="can't be reached"):
        RemoteChat("http://127.0.0.1:9")
    with pytest.raises(RemoteError, match="must begin with http"):
        RemoteChat("file:///etc/passwd")
    remote = RemoteChat(server.url)
    with pytest.raises(RemoteError, match=r"answers 404: .*nope"):
        list(remote.answer(Turn(messages=[{"role": "user", "content": "x"}], adapters="nope")))
    remote.close()


def test_leaving_a_servers_answer_ends_it_there(server: Running) -> None:
    remote = RemoteChat(server.url)
    pieces = remote.answer(Turn(messages=[{"role": "user", "content": "x"}], options={"max_tokens": 4000}))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    end = time.monotonic() + 20
    with server.http() as http:
        while (load := http.get("/load").json()["server_load"]) and time.monotonic() < end:
            time.sleep(0.05)
    assert load == 0


def test_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2J\tb\r\n\x9bc").replace("\N{REPLACEMENT CHARACTER}", "?") == "a?[2J\tb?\n?c"


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    tiny_model("llama").save_pretrained(root / "model")
    character_tokenizer().save_pretrained(root / "model")
    return root / "model"


def test_lines_of_a_pipe_are_questions(folder: Path, root: Path) -> None:
    arguments = ["chat", "--model", str(folder), "--load", f"a={root / 'a'}", "--temperature", "0", "--max-tokens", "6"]
    result = CliRunner().invoke(cli, arguments, input="tell me\n/adapters a\nand more\n")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert len(result.stdout.splitlines()) == 2
    failed = CliRunner().invoke(cli, arguments, input="/adapters b\n")
    assert failed.exit_code == 1
    assert "'b' is not loaded" in failed.stderr


def test_what_is_for_a_model_here_is_refused_beside_a_server() -> None:
    result = CliRunner().invoke(cli, ["chat", "--url", "http://127.0.0.1:9", "--load", "a=b"])
    assert isinstance(result.exception, ConfigError)
    assert "--load is for a model here" in str(result.exception)


@pytest.mark.slow
def test_a_real_terminal_shows_answers_and_takes_ctrl_c(folder: Path, tmp_path: Path) -> None:
    program = "from loraplex.cli.app import app; app()"
    command = [sys.executable, "-c", program, "chat", "--model", str(folder), "--max-tokens", "200000"]
    for folder_of_cache in ("kernels", "tuning"):
        (tmp_path / folder_of_cache).symlink_to(cache_folder() / folder_of_cache)
    with Dialogue(command, {"LORAPLEX_CACHE": str(tmp_path)}) as terminal:
        terminal.wait_for("none> ")
        terminal.type("tell me\r")
        terminal.wait_for("tell me\r\n")
        terminal.type("\x03")
        assert "stopped" in terminal.wait_for("none> ")
        terminal.type("\x03")
        terminal.wait_for("ctrl-D ends the chat")
        terminal.type("/exit\r")
        assert terminal.status() == 0
    assert (tmp_path / "chat_history").read_text().splitlines() == ["tell me", "/exit"]


def test_torch_is_not_imported_to_talk_to_a_server() -> None:
    program = (
        "import sys\nfrom loraplex.cli.app import cli\n"
        "try:\n    cli(['chat', '--url', 'http://127.0.0.1:9'], standalone_mode=False)\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[:2] == ["RemoteError", "[]"], found.stderr
