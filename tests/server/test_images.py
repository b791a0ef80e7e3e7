"""Images over HTTP: data URIs in the parts of a message, answered as transformers and PEFT answer them."""

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image

from loraplex.models.multi_lora import MultiLoraModel
from loraplex.server.auth.keys import KeyFile
from tests.engine.test_images import encoded, make, picture_model, processed
from tests.server.tiny_server import Running, running, settings, wait_until_idle

NAME = "llava"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def model(folder: Path) -> MultiLoraModel:
    return picture_model(NAME, folder)


@pytest.fixture(scope="module")
def server(model: MultiLoraModel) -> Iterator[Running]:
    with running(model, settings()) as server:
        yield server


def image_part(data: bytes, kind: str = "png") -> dict[str, Any]:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def ask(server: Running, content: Any, model: str = "a", **options: Any) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0}
    with server.http() as http:
        return http.post("/v1/chat/completions", json=body | {"ignore_eos": True, "logprobs": True} | options)


@torch.no_grad()
def expected(model: MultiLoraModel, folder: Path, text: str, data: list[bytes]) -> list[str]:
    inputs = processed(NAME, model, text, [Image.open(io.BytesIO(picture)).convert("RGB") for picture in data])
    oracle = peft.PeftModel.from_pretrained(make(NAME), str(folder / "a"), "a").eval()
    made = oracle.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    return [model.tokenizer.decode([token], skip_special_tokens=False) for token in made[0, -6:].tolist()]


def test_an_answer_about_images_is_that_of_peft(server: Running, model: MultiLoraModel, folder: Path) -> None:
    pictures = [encoded(40, 31), encoded(20, 50, seed=1)]
    answer = ask(server, [text_part("this "), image_part(pictures[0]), text_part("or"), image_part(pictures[1])])
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert tokens == expected(model, folder, "<|im_start|>this <image>or<image>|", pictures)


def test_the_openai_client_sends_images(server: Running) -> None:
    content: Any = [text_part("what?"), image_part(encoded(9, 9)) | {}]
    content[1]["image_url"]["detail"] = "auto"
    messages: Any = [{"role": "user", "content": content}]
    answer = server.client().chat.completions.create(model="a", messages=messages, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("<|im_start|>") - 11 + len("what?") + 4 + len("|")


def test_responses_take_images_as_chats_do(server: Running) -> None:
    pictures = [image_part(encoded(40, 31)), image_part(encoded(20, 50, seed=1))]
    asked = [text_part("this "), pictures[0], text_part("or"), pictures[1]]
    chat = ask(server, asked, logprobs=False, ignore_eos=False).json()
    parts = [{"type": "input_image", "image_url": part["image_url"]["url"], "detail": "auto"} for part in pictures]
    texts = [{"type": "input_text", "text": text} for text in ("this ", "or")]
    content: Any = [texts[0], parts[0], texts[1], parts[1]]
    response = server.client().responses.create(
        model="a", input=[{"role": "user", "content": content}], max_output_tokens=6, temperature=0
    )
    assert response.usage is not None
    assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert response.output_text == chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_key_pays_for_the_tokens_of_images_and_is_told_of_them(
    model: MultiLoraModel, tmp_path: Path, stream: bool
) -> None:
    """The prompt that a client sends has one token for each image."""
    file = KeyFile(tmp_path / "keys.json")
    key, record = file.create(tokens_per_minute=200)
    content = [text_part("what?"), *[image_part(encoded(9, 9))] * 16]
    num_prompt = len("<|im_start|>") - 11 + len("what?") + 4 * 16 + len("|")
    body = {"model": "a", "messages": [{"role": "user", "content": content}], "max_tokens": 6, "ignore_eos": True}
    body |= {"return_token_ids": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    with running(model, settings(keys=file)) as server, server.http(key) as http:
        began = time.monotonic()
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        wait_until_idle(server)
        paid = 200 - server.server.state.usages.of(record)._tokens._level
        refilled = (time.monotonic() - began) * 200 / 60  # at most
    assert num_prompt + 6 - 1 - refilled < paid <= num_prompt + 6
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines] if stream else [answer.json()]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {num_prompt}
    (ids,) = [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk]
    assert len(ids) == num_prompt


def test_an_image_token_that_a_message_spells_is_text(server: Running, model: MultiLoraModel, folder: Path) -> None:
    picture = encoded(33, 33)
    answer = ask(server, [text_part("<image>"), image_part(picture)])
    assert answer.status_code == 200, answer.text
    spelt = answer.json()["usage"]["prompt_tokens"]
    plain = ask(server, [text_part("A"), image_part(picture)]).json()["usage"]["prompt_tokens"]
    assert spelt == plain + len("<image>") - 1


@pytest.mark.parametrize(
    ("content", "status", "told"),
    [
        ([{"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}], 400, "addresses are not fetched"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], 400, "addresses are not fetched"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}], 400, "no base64"),
        ([{"type": "image_url", "image_url": {"url": "data:text/html;base64,aaaa"}}], 400, "data URI"),
        ([{"type": "image_url", "image_url": "data:image/png;base64,aaaa"}], 400, "image_url must be"),
        ([{"type": "input_audio", "input_audio": {}}], 400, "other parts are not supported"),
        ([image_part(b"no picture")], 400, "image 0 can't be read"),
        ([image_part(encoded(9, 9))] * 17, 400, "17 images; 16 are possible"),
        ([image_part(encoded(9, 9)) | {"image_url": {"url": "data:", "detail": "low"}}], 400, "detail must be"),
    ],
)
def test_what_is_no_image_is_refused(server: Running, content: Any, status: int, told: str) -> None:
    answer = ask(server, content)
    assert (answer.status_code, told in answer.text) == (status, True), answer.text


def test_images_for_a_model_without_any_are_refused(tmp_path: Path) -> None:
    from tests.server.tiny_server import make_model, write_adapters

    with running(make_model(write_adapters(tmp_path)), settings()) as server:
        answer = ask(server, [text_part("a"), image_part(encoded(9, 9))])
    assert answer.status_code == 400
    assert "takes none" in answer.text
