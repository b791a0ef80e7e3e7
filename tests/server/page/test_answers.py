"""Answers in a real browser, before a real server; the API's own answers are the oracle."""

import base64
import json
import time

import numpy as np
import pytest
from playwright.sync_api import expect

from loraplex import Engine
from tests.server.page.driver import NUM_TOKENS, QUESTION, api_answer, ask, choose, index_of, texts, tokens
from tests.server.tiny_server import wait_until_idle


def array(described):
    raw = np.frombuffer(base64.b64decode(described["data"]), dtype=described["dtype"])
    return raw.reshape(described["shape"])


def test_an_answer_is_the_apis(page, server):
    choose(page, "a")
    ask(page)
    assert texts(page) == [api_answer(server, "a")["message"]["content"]]
    assert "".join(token.text_content() for token in tokens(page)) == texts(page)[0]
    assert page.locator(".legend").count() == 0, "only a mixture has experts"


def test_tokens_wear_the_colour_of_the_expert_that_leads(page, server):
    choose(page, "mix-ab")
    ask(page)
    (told,) = api_answer(server, "mix-ab", return_scalings=True)["scalings"]
    leaders = array(told["values"]).mean(axis=1).argmax(axis=1)
    read = tokens(page, ".prompt-read")
    assert [token.text_content() for token in read] == told["tokens"][: len(read)]
    answer = [token for token in tokens(page) if index_of(token) < NUM_TOKENS - 1]  # the last was never run
    expected = leaders[[*range(len(read)), *(len(read) + index_of(token) for token in answer)]]
    script = "(span) => getComputedStyle(span).getPropertyValue('--expert')"
    colors = [token.evaluate(script) for token in (*read, *answer)]
    looks = ["light-dark(#084e6c, #4c9cc6)", "light-dark(#86440a, #d77526)"]
    assert [looks.index(color) for color in colors] == expected.tolist()
    assert len(answer) > NUM_TOKENS // 2
    assert set(leaders) == {0, 1}, "both experts lead somewhere, or this shows nothing"


def test_the_heat_map_shows_every_layers_scalings(page, server):
    choose(page, "mix-ab")
    ask(page)
    (told,) = api_answer(server, "mix-ab", return_scalings=True)["scalings"]
    values = array(told["values"])
    hovered = tokens(page)[2]
    hovered.hover()
    page.wait_for_selector("#token-panel canvas")
    page.focus("#token-panel canvas")
    modules = sum(layer.startswith("model.layers.0.") for layer in told["layers"])
    page.keyboard.press("ArrowDown")  # the second block
    for _ in range(modules + 1):  # past the first expert's modules
        page.keyboard.press("ArrowRight")
    layer, expert = modules + 1, 1
    expected = values[len(tokens(page, ".prompt-read")) + index_of(hovered), layer, expert]
    module = told["layers"][layer].rsplit(".")[-1]
    assert page.inner_text(".readout") == f"block 1 {module} · b {expected:.3f}"


def test_a_link_of_two_mixtures_has_the_experts_of_both(page):
    choose(page, "mix-ab", "mix-ac")
    ask(page)
    assert page.locator(".legend li").all_text_contents() == ["mix-ab: a", "mix-ab: b", "mix-ac: a", "mix-ac: c"]
    tokens(page)[0].click()
    expect(page.locator("#token-panel canvas")).to_have_count(2)
    assert page.locator(".bars:not(.alternatives) li").count() == 4
    expect(page.locator("#token-panel")).to_contain_text("mix-ac. Down: 2 blocks.")


def test_attention_on_demand(page, server):
    ask(page)
    page.focus(".answer > .answer-text")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.click("text=Answer again with attention")
    page.wait_for_selector(".looked-list li")
    capture = {"queries": "generated", "reduce": "mean"}
    choice = api_answer(server, "tiny", capture_attention=capture)
    assert texts(page) == [choice["message"]["content"]], "the same answer again"
    captured = choice["captured_attention"]
    index = index_of(page.locator(".token.held"))
    seen = captured["query_positions"][index] + 1
    weights = array(captured["weights"]).astype(np.float32).mean(axis=(0, 1))[index, :seen]
    expected = sorted(weights[1:].tolist(), reverse=True)[:6]  # the first token is left out
    shown = [float(item) for item in page.locator(".looked-list .number").all_text_contents()]
    np.testing.assert_allclose(shown, expected, atol=6e-4)
    page.uncheck(".attention input[type=checkbox]")
    most = float(page.locator(".looked-list .number").first.text_content())
    assert most == pytest.approx(float(weights.max()), abs=6e-4)
    page.select_option("select[aria-label=Layer]", label="layer 1")
    of_layer = array(captured["weights"]).astype(np.float32)[1].mean(axis=0)[index, :seen]
    most = float(page.locator(".looked-list .number").first.text_content())
    assert most == pytest.approx(float(of_layer.max()), abs=6e-4)


def test_escape_stops_the_answer_and_the_engine(page, server, monkeypatch):
    step = Engine.step

    def slow_step(engine):
        time.sleep(0.05)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)
    page.fill("#max-tokens", "180")
    page.fill("#prompt", QUESTION)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".answer > .answer-text .token")
    page.keyboard.press("Escape")
    page.wait_for_selector(".answer:not(.streams)")
    assert "stopped" in page.inner_text(".answer-foot")
    wait_until_idle(server)
    count = len(texts(page)[0])
    page.wait_for_timeout(300)
    assert 0 < len(texts(page)[0]) == count < 180
    assert page.is_visible("#send")


def test_what_a_model_says_is_text(page):
    said = "<img src=x onerror=document.title='bad'><b>bold</b> 🙂 end"
    entry = {"logprob": -0.5, "bytes": [], "top_logprobs": []}
    content = [entry | {"token": token} for token in ("<img src=x", " onerror=document.title='bad'>", "<b>bold")]
    # The bytes of one character in three tokens, and an end token without text.
    content += [entry | {"token": token} for token in ("</b> ", "\ufffd", "\ufffd", "\ufffd", " end", "<|im_end|>")]
    choice = {"index": 0, "delta": {"content": said}, "logprobs": {"content": content}, "finish_reason": "stop"}
    lines = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=lines, content_type="text/event-stream"))
    ask(page, "<script>document.title = 'bad'</script>")
    assert texts(page) == [said]
    assert [token.text_content() for token in tokens(page)][3:] == ["</b> ", "🙂", " end"]
    assert page.locator("#turns img, #turns b, #turns script").count() == 0
    assert page.title() == "loraplex"


def test_an_answer_that_is_cut_off_is_an_error(page):
    chunk = {"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]}
    body = f"data: {json.dumps(chunk)}\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page)
    assert "ended before the answer did" in page.inner_text(".refusal")
