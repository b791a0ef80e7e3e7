"""Markdown and code, what can be done with an answer, chats that the browser keeps, files, and what keys may load."""

import json
from typing import Any

import pytest
from playwright.sync_api import expect

from loraplex.server.auth.keys import KeyFile
from tests.server.page.driver import NUM_TOKENS, add_column, answer_with, ask, bodies, choose, finished, reload, texts
from tests.server.tiny_server import make_model, running, settings

MARKDOWN = """# Title
A **bold *nested*** word, `code`, ~~gone~~ and [a page](https://example.com/x "t").

1. one
   - deep **item**
2. two

> quoted

```python
def f():
    return "<b>"
```

| a | b |
|---|---|
| 1 | `2` |

<img src=x onerror="document.title='bad'"><script>document.title='bad'</script>
[bad](javascript:document.title='bad') ![image](https://example.com/i.png) [relative](/v1/models) \\*no\\*
"""


# What has been slow, or deep, in one parser of markdown or another.
HARD = ["*" * 6000, "[" * 6000, "`" * 6000, "> " * 3000, "1. " * 2000, "> " * 9000, "|a" * 3000, "<a" * 3000]


def shown(page: Any, selector: str) -> list[str]:
    return page.locator(f".answer > .answer-text {selector}").all_text_contents()


def test_markdown_is_shown_and_nothing_of_it_is_html(page):
    page.check("#formatted")
    answer_with(page, MARKDOWN)
    ask(page)
    assert shown(page, "[role=heading]") == ["Title"]
    assert shown(page, "strong") == ["bold nested", "item"]
    assert shown(page, "em") == ["nested"]
    assert shown(page, "del") == ["gone"]
    assert shown(page, "blockquote") == ["quoted"]
    assert shown(page, "pre") == ['def f():\n    return "<b>"']
    assert shown(page, "td") == ["1", "2"]
    assert [item.split("\n")[0] for item in shown(page, "ol > li")] == ["onedeep item", "two"]
    assert shown(page, "a") == ["a page"], "no other address is a link"
    assert page.get_attribute(".answer-text a", "rel") == "noopener noreferrer"
    assert page.locator("#turns img, #turns script, #turns iframe").count() == 0
    text = page.text_content(".answer > .answer-text")
    assert "<img src=x onerror=" in text
    assert "*no*" in text
    assert page.title() == "loraplex"
    page.uncheck("#formatted")
    assert texts(page) == [MARKDOWN]
    page.check("#formatted")
    assert shown(page, "strong") == ["bold nested", "item"]


def test_tokens_keep_their_elements_in_markdown(page):
    """Every token is shown where it stands; marks have none."""
    page.check("#formatted")
    answer_with(page, "A **bold word** and\n\n```\ncode here\n```\n")
    ask(page)
    found = page.locator(".answer > .answer-text .token").all()
    assert [one.text_content() for one in found] == ["A", " ", "bold", " word", " and", "code", " here"]
    indices = [int(one.get_attribute("data-index")) for one in found]
    assert indices == sorted(indices)
    found[2].hover()
    expect(page.locator("#token-panel .token-head code")).to_have_text("**bold")


def test_no_text_holds_the_page_up(page):
    answer_with(page, HARD[3])
    page.check("#formatted")
    ask(page)
    assert HARD[3] in page.text_content(".answer > .answer-text")
    seconds = page.evaluate(
        """async (texts) => {
            const { markdown } = await import("/page/markdown.js");
            return texts.map((text) => {
                const began = performance.now();
                markdown(text, (start, stop) => [text.slice(start, stop)]);
                return (performance.now() - began) / 1000; }); }""",
        HARD,
    )
    assert max(seconds) < 20, "a tenth of a second on an idle machine"


def test_code_and_answers_are_copied(page, context):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.check("#formatted")
    answer_with(page, "Say:\n\n```sh\nls -l\n```")
    ask(page)
    copied = "navigator.clipboard.readText()"
    page.click("[aria-label='Copy the code']")
    expect(page.locator("#status")).to_have_text("Copied")
    assert page.evaluate(copied) == "ls -l"
    page.click("[aria-label='Copy the answer of tiny']")
    page.wait_for_function(f"{copied}.then((text) => text.includes('Say:'))")
    assert page.evaluate(copied) == "Say:\n\n```sh\nls -l\n```"


@pytest.mark.parametrize("failure", ["abort", "cut", "error", "refused"])
def test_after_any_failure_one_can_try_again(page, failure):
    chunk = {"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]}
    error = {"error": {"message": "it broke", "type": "server_error", "code": "internal_error", "param": None}}
    failures = {
        "abort": lambda route: route.abort(),
        "cut": lambda route: route.fulfill(body=f"data: {json.dumps(chunk)}\n\n", content_type="text/event-stream"),
        "error": lambda route: route.fulfill(body=f"data: {json.dumps(error)}\n\n", content_type="text/event-stream"),
        "refused": lambda route: route.fulfill(status=400, json=error),
    }
    page.route("**/v1/chat/completions", failures[failure])
    sent = bodies(page)
    ask(page)
    assert page.is_visible(".refusal")
    page.unroute("**/v1/chat/completions")
    page.click("text=Try again")
    finished(page)
    assert page.locator(".refusal").count() == 0
    assert len(texts(page)[0]) > 0
    assert sent[0] == sent[1]


def test_chats_are_kept_in_the_browser_and_opened_again(page):
    page.evaluate("localStorage.removeItem('loraplex-chats')")
    reload(page)
    choose(page, "mix-ab")
    add_column(page, "b")
    ask(page, "first chat")
    kept = texts(page)
    color = "(span) => getComputedStyle(span).getPropertyValue('--expert')"
    led = page.locator(".answer > .answer-text .led")
    colors = [one.evaluate(color) for one in led.all()]
    assert colors
    page.click("#new-chat")
    ask(page, "second chat")
    reload(page)
    assert page.locator(".saved-title").all_text_contents() == ["second chat", "first chat"]
    page.click("text=first chat")
    assert texts(page) == kept
    assert [one.evaluate(color) for one in led.all()] == colors
    assert page.locator(".differs").count() > 0
    page.locator(".answer .token").first.click()
    expect(page.locator(".alternatives li").first).to_be_visible()
    page.click("[aria-label='Regenerate the answer of b']")
    finished(page, 2)
    page.click("[aria-label='Delete the chat second chat']")
    assert page.locator(".saved-title").all_text_contents() == ["first chat"]
    page.uncheck("#keep-chats")
    page.click("#new-chat")
    ask(page, "third chat")
    assert page.locator(".saved-title").all_text_contents() == ["first chat"]
    page.check("#keep-chats")
    page.click("#forget-chats")
    assert page.evaluate("localStorage.getItem('loraplex-chats')") == "[]"


def test_kept_chats_never_take_more_than_their_room(page):
    page.evaluate(
        """() => { const chats = Array.from({ length: 40 }, (_, index) =>
            ({ id: String(index), at: 0, title: `old ${index}`, turns: [], padding: "x".repeat(90000) }));
            localStorage.setItem("loraplex-chats", JSON.stringify(chats)); }"""
    )
    reload(page)
    ask(page, "newest")
    expect(page.locator(".saved-title").first).to_have_text("newest")
    assert page.evaluate("localStorage.getItem('loraplex-chats').length") < 3_100_000
    assert "old 0" in page.locator(".saved-title").all_text_contents()
    assert "old 39" not in page.locator(".saved-title").all_text_contents(), "the oldest went"
    page.click("#forget-chats")
    page.evaluate("localStorage.setItem('loraplex-chats', 'damaged')")
    reload(page)
    expect(page.locator("#no-chats")).to_be_visible()


def test_a_chat_becomes_a_file(page, tmp_path):
    choose(page, "a")
    ask(page)
    with page.expect_download() as download:
        page.click("#export-markdown")
    assert download.value.suggested_filename.endswith(".md")
    written = download.value.path().read_text()
    assert written.startswith("## sort fedcba\n")
    assert f"### a\n\n{texts(page)[0]}\n" in written
    with page.expect_download() as download:
        page.click("#export-json")
    told = json.loads(download.value.path().read_text())
    assert (told["format"], told["version"]) == ("loraplex-chat", 1)
    (turn,) = told["turns"]
    assert turn["answers"][0]["text"] == texts(page)[0]
    assert turn["answers"][0]["asked"]["model"] == "a"
    assert len(turn["answers"][0]["tokens"]) == NUM_TOKENS


def test_adapters_are_loaded_and_unloaded_from_the_page(page, server, root):
    page.wait_for_selector("#load-form:visible")
    page.fill("#load-name", "late/one")
    page.fill("#load-path", "nowhere")
    page.press("#load-path", "Enter")
    expect(page.locator("#load-problem")).to_contain_text("there is no folder 'nowhere'")
    page.fill("#load-path", "c")
    page.press("#load-path", "Enter")
    page.wait_for_selector("[aria-label='Unload late/one']")
    assert "late/one" in server.model.names()
    choose(page, "late/one")
    page.click("[aria-label='Unload late/one']")
    assert "late/one" in server.model.names(), "asks once more"
    page.click("[aria-label='Unload late/one']")
    page.wait_for_selector("[aria-label='Unload late/one']", state="detached")
    assert "late/one" not in server.model.names()
    expect(page.locator("#link-a .model-text")).to_have_text("tiny")


def test_keys_are_offered_only_what_they_may_load(context, root, tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    keys = {
        "none": file.create(note="none")[0],
        "own": file.create(note="own", load=("b", "own/*"), roots=(str(root),))[0],
        "rootless": file.create(note="rootless", load=("own/*",), roots=(str(tmp_path),))[0],
    }
    with running(make_model(root), settings(keys=file, roots=(str(root),))) as server:
        found = {}
        for name, key in keys.items():
            page = context.new_page()
            page.goto(server.url)
            page.fill("#key", key)
            page.press("#key", "Enter")
            page.wait_for_selector("#adapters-panel table")
            labels = page.locator("#adapters-panel button").evaluate_all("(all) => all.map((one) => one.ariaLabel)")
            found[name] = (page.is_visible("#load-form"), labels)
            page.close()
    assert found["none"] == (False, [])
    assert found["own"] == (True, ["Pin b", "Unload b"])
    assert found["rootless"] == (False, [])
