"""Columns that are compared: any number of choices, the same seed, what differs, and the request as a command."""

import json
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.server.page.conftest import tab
from tests.server.page.driver import (
    QUESTION,
    add_column,
    answer_with,
    api_answer,
    ask,
    bodies,
    choose,
    finished,
    reload,
    texts,
)
from tests.server.test_auto_model import ENDS, fitted
from tests.server.tiny_server import Running, running, settings


@pytest.fixture(scope="module")
def routed(root: Path) -> Iterator[Running]:
    """A server with a mixture in one pass, and `auto`."""
    config = settings()
    with running(fitted(root), replace(config, engine=replace(config.engine, auto_floor=-1.0))) as server:
        yield server


def words(page: Any, place: int) -> list[str]:
    """What is marked in an answer."""
    return [text.strip() for text in page.locator(".answer").nth(place).locator(".differs").all_text_contents()]


def test_every_question_is_fresh_unless_a_history_is_chosen(page, server):
    ask(page)
    first = texts(page)[0]
    ask(page, "again")
    alone = [{"role": "user", "content": "again"}]
    assert texts(page)[1] == api_answer(server, "tiny", messages=alone)["message"]["content"]
    assert page.locator(".context:visible").count() == 0
    page.click("#new-chat")
    assert page.locator(".turn").count() == 0
    page.select_option("#context", "own")
    ask(page)
    ask(page, "again")
    turns = [("user", QUESTION), ("assistant", first), ("user", "again")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert texts(page)[1] == api_answer(server, "tiny", messages=messages)["message"]["content"]
    assert page.inner_text(".context:visible") == "After 1 turn: each column goes on from its own answers"


def test_columns_go_on_from_their_own_answers_or_from_the_firsts(page):
    sent = bodies(page)
    choose(page, "a")
    add_column(page, "b")
    ask(page)
    first, second = texts(page)
    assert first != second, "or the columns' histories can't be told apart"
    page.select_option("#context", "own")
    ask(page, "own")
    page.select_option("#context", "shared")
    ask(page, "shared")
    told = [[m["content"] for m in body["messages"] if m["role"] == "assistant"] for body in sent]
    assert told[:4] == [[], [], [first], [second]]
    assert told[4] == told[5] == [first, texts(page)[2]]
    assert "go on from the first column's answers" in page.locator(".context:visible").last.inner_text()


def test_any_number_of_columns_answers_with_one_seed(context, routed):
    names = [None, "a", "b", "c", "spectr", "mix-ac"]
    with tab(context, routed) as page:
        page.fill("#temperature", "1")
        sent = bodies(page)
        for name in names[1:]:
            add_column(page, name)
        page.fill("#columns .column:nth-child(3) input[type=number]", "0.5")
        add_column(page, "a", "mix-ab")
        ask(page)
        models = ["tiny", "a", "b:0.5", "c", "spectr", "mix-ac", "a+mix-ab"]
        (seed,) = {body["seed"] for body in sent}
        expected = [api_answer(routed, model, seed=seed, temperature=1)["message"]["content"] for model in models]
        assert sorted(body["model"] for body in sent) == sorted(models)
        assert texts(page) == expected
        legend = page.locator(".answer").nth(4).locator(".legend li").all_text_contents()
        assert legend == ["a", "b"], "a router's experts"
        boxes = [part.bounding_box() for part in page.locator(".answer > .answer-text").all()]
        assert len({box["y"] for box in boxes}) == 1, "aligned"
        assert all(one["x"] + one["width"] <= other["x"] for one, other in pairwise(boxes))
        page.click("[aria-label='Remove column B']")
        assert page.locator("#columns .column").count() == len(models) - 1
        page.click("#one-each")
        chosen = page.locator(".model-text").all_text_contents()
        assert chosen == ["tiny", "a", "b", "c", "mix-ab", "mix-ac", "spectr"]


def test_auto_tells_what_it_chose(context, routed):
    with tab(context, routed) as page:
        choose(page, "auto")
        assert page.is_disabled("#link-a select")
        for end in ENDS.values():
            question = f"7 {end}".strip()
            choice = api_answer(routed, "auto", messages=[{"role": "user", "content": question}])
            ask(page, question)
            chosen = choice["auto"]
            told = page.locator(".answer-head code").last.text_content()
            assert told == f"auto → {chosen['model']} ({chosen['score']:.2f})"
            assert texts(page)[-1] == choice["message"]["content"]


def test_auto_that_chose_a_mixture_shows_its_experts(page):
    models = page.evaluate("fetch('/v1/models').then((response) => response.json())")
    models["data"].append({"id": "auto", "kind": "auto", "experts": []})
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    reload(page)
    choose(page, "auto")
    sent = bodies(page)
    choice = {"index": 0, "delta": {"content": "x"}, "auto": {"model": "mix-ac", "score": 0.9}, "finish_reason": "stop"}
    stream = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    ask(page)
    assert page.text_content(".answer-head code") == "auto → mix-ac (0.90)"
    assert page.locator(".legend li").all_text_contents() == ["a", "c"]
    assert sent[0]["return_scalings"] is True


def test_words_that_differ_are_marked(page):
    answer_with(page, "the cat sat on the mat", "the dog sat on a mat", "the cat sat on the mat", "the cat sat")
    choose(page, "a")
    for name in ("b", "c", "mix-ab"):
        add_column(page, name)
    ask(page)
    assert [words(page, place) for place in range(4)] == [[], ["dog", "a"], [], []]
    left_out = "Differs from a: words are left out, from word 4 on"
    notes = page.locator(".answer .changes:visible").all_text_contents()
    assert notes == ["Differs from a: 2 of 6 words, from word 2 on", "The same words as a", left_out]
    decoration = "(span) => getComputedStyle(span).textDecorationLine"
    assert page.locator(".differs").first.evaluate(decoration) == "underline"
    page.uncheck("#mark-differences")
    assert page.locator(".differs").first.evaluate(decoration) == "none"
    assert page.locator(".changes:visible").count() == 0


@pytest.mark.parametrize("tool", ["shell", "curl"])
def test_an_answer_as_curl_gives_the_answer(page, server, tool):
    question = 'it\'s "quoted" $HOME `id`\n\\n é'
    choose(page, "a", "b")
    page.fill("#temperature", "1")
    page.fill("#system", "Don't.")
    ask(page, question)
    page.click("text=curl")
    command = page.inner_text("dialog pre")
    assert "Authorization" not in command, "without a key none is named"
    if tool == "curl":
        done = subprocess.run(["bash", "-c", f"{command} --silent"], capture_output=True, text=True, timeout=60)
        told = json.loads(done.stdout)
    else:
        parts = shlex.split(command)
        assert parts[:2] == ["curl", f"{server.url}/v1/chat/completions"]
        body = json.loads(parts[parts.index("--data") + 1])
        assert body["messages"] == [{"role": "system", "content": "Don't."}, {"role": "user", "content": question}]
        told = server.http().post(parts[1], json=body).json()
    assert [told["choices"][0]["message"]["content"]] == texts(page)
    page.keyboard.press("Escape")
    assert page.locator("dialog").count() == 0


def test_regenerate_edit_and_ask_again(page, server):
    choose(page, "a")
    page.fill("#temperature", "1")
    sent = bodies(page)
    ask(page)
    page.click("text=Regenerate")
    finished(page)
    assert sent[0]["seed"] != sent[1]["seed"]
    assert {**sent[0], "seed": 0} == {**sent[1], "seed": 0}
    page.select_option("#context", "own")
    ask(page, "and then?")
    page.locator("[aria-label='Edit the question']").first.click()
    page.fill("[aria-label=Question]", "sort cba")
    add_column(page, "b")
    page.press("[aria-label=Question]", "Enter")
    finished(page, 3)
    assert [body["messages"][-1]["content"] for body in sent[3:]] == ["sort cba"] * 2
    assert page.locator(".user").all_text_contents() == ["sort cba", "and then?"]
    assert "before the question above was changed" in page.locator(".context:visible").inner_text()
    page.locator("[aria-label^='Ask again']").last.click()
    finished(page, 4)
    history = [m["content"] for m in sent[-1]["messages"]]
    assert history == ["sort cba", texts(page)[1], "and then?"], "the second column's own"
    page.locator("[aria-label='Remove the answer of b']").first.click()
    assert page.locator(".answer").count() == 3


def test_sampling_fields_are_the_apis(page):
    sent = bodies(page)
    page.fill("#top-p", "0.9")
    page.click("text=Stop texts and schema")
    page.fill("#stop-texts", "END\n\\n\\n")
    ask(page)
    assert sent[0]["top_p"] == 0.9
    assert sent[0]["stop"] == ["END", "\n\n"]
    assert "response_format" not in sent[0]
    page.fill("#stop-texts", "")
    page.fill("#schema", '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}')
    page.fill("#max-tokens", "60")
    ask(page)
    assert "stop" not in sent[1]
    assert sent[1]["response_format"]["json_schema"]["schema"] == json.loads(page.input_value("#schema"))
    assert "can't be followed with this model's" in page.inner_text(".refusal"), "a tokenizer of characters can't"
    page.fill("#schema", "{nothing")
    page.fill("#prompt", "x")
    page.press("#prompt", "Enter")
    assert "JSON schema:" in page.inner_text("#notice")
    assert len(sent) == 2
    page.fill("#schema", "")
    page.fill("#top-p", "1.5")
    page.press("#prompt", "Enter")
    expect(page.locator("#notice")).to_contain_text("Top p:")
