"""Links, keys, errors, panels, and how the page looks and is used, in a real browser before a real server."""

import re

import pytest
from playwright.sync_api import expect

from loraplex.server.auth.keys import KeyFile
from tests.server.page.driver import NUM_TOKENS, add_column, api_answer, ask, choose, texts
from tests.server.tiny_server import make_model, running, settings


def test_a_link_is_made_by_keyboard(page):
    choose(page, "a", "b", "c")
    page.focus("[aria-label='Weight of b']")
    page.keyboard.press("Home")
    page.press("[aria-label='Move up: c']", "Enter")
    assert page.text_content("#link-a .model-text") == "a+c+b:0"
    page.press("[aria-label='Remove a']", "Enter")
    page.fill("[aria-label='Weight of c, as a number']", "0.25")
    page.fill("[aria-label='Weight of b, as a number']", "-2")  # more than the slider has
    assert page.text_content("#link-a .model-text") == "c:0.25+b:-2"
    assert page.input_value("[aria-label='Weight of c']") == "0.25"
    assert page.input_value("[aria-label='Weight of b']") == "0"


def test_an_error_is_told_in_the_apis_words_and_gives_the_prompt_back(page):
    long = "x" * 400
    ask(page, long)
    refusal = page.inner_text(".refusal")
    assert "tokens or more, but can have 255 here." in refusal
    assert "field messages" in refusal
    assert page.input_value("#prompt") == long
    page.check("#capture")
    page.fill("#capture-layers", "1, x")
    page.press("#prompt", "Enter")
    assert "“x” is no number" in page.inner_text("#notice")


def test_the_adapters_panel_pins(page, server):
    page.wait_for_selector("[aria-label='Pin a']")
    page.click("[aria-label='Pin a']")
    page.wait_for_selector("[aria-label='Pin a'][aria-pressed=true]")
    pinned = {state.name for state in server.model.adapters() if state.pinned}
    assert pinned == {"a"}
    page.click("[aria-label='Pin a']")
    page.wait_for_selector("[aria-label='Pin a'][aria-pressed=false]")
    assert "disk" in page.inner_text("#adapters-panel") or "slot" in page.inner_text("#adapters-panel")


def test_an_adapter_that_is_loaded_or_unloaded_is_told_to_the_page(page, server, root):
    server.model.load_adapter("late", root / "a")
    try:
        page.wait_for_selector("#link-a option[value=late]", state="attached")
        choose(page, "late")
    finally:
        server.model.unload("late")
    expect(page.locator("#link-a .model-text")).to_have_text("tiny")


def test_the_load_is_shown(page):
    expect(page.locator(".rate")).to_have_text(re.compile(r"^[0-9.]+ tokens/s$"))
    assert page.inner_text(".facts").split("\n")[:2] == ["running", "0"]


def test_a_key_stays_in_its_tab(context, root, tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    key = file.create(note="user", use=("a",), base=False)[0]
    with running(make_model(root), settings(keys=file)) as server:
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("#key-form:not([hidden])")
        assert "needs an API key" in page.inner_text("#notice")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        expect(page.locator("#notice")).to_contain_text("refuses")
        page.fill("#key", key)
        page.press("#key", "Enter")
        page.wait_for_selector("#link-a option[value=a]", state="attached")
        assert page.locator("#link-a option[value=mix-ab], #link-a option[value=b]").count() == 0
        page.wait_for_selector("text=This key may not see the server's load.")
        assert "may not use the base model" in page.inner_text("#link-a .problem")
        choose(page, "a")
        page.fill("#max-tokens", str(NUM_TOKENS))
        page.fill("#temperature", "0")
        ask(page)
        assert texts(page) == [api_answer(server, "a", key)["message"]["content"]]
        assert key not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
        other = context.new_page()
        other.goto(server.url)
        other.wait_for_selector("#key-form:not([hidden])")
        other.close()
        page.close()


def test_everything_has_a_name_and_the_focus_is_seen(page):
    choose(page, "a", "b")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")].filter((one) =>
            !one.ariaLabel && !one.labels?.length && !one.textContent.trim()).map((one) => one.outerHTML)"""
    )
    assert nameless == []
    page.focus("#key-button")
    seen = ["key-button"]
    for _ in range(34):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            """() => { const one = document.activeElement; const style = getComputedStyle(one);
                const name = one.id || one.ariaLabel || one.tagName;
                return [name, style.outlineStyle, parseFloat(style.outlineWidth)]; }"""
        )
        seen.append(focused[0])
        assert focused[0] == "BODY" or (focused[1] != "none" and focused[2] >= 1), f"no outline around {focused[0]}"
    order = ["key-button", "theme-button", "Weight of a", "add-column", "temperature", "system", "prompt", "send"]
    assert [seen.index(name) for name in order] == sorted(seen.index(name) for name in order)


def test_themes(page):
    background = "getComputedStyle(document.documentElement).backgroundColor"
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(background)
    assert dark != light
    page.click("#theme-button")
    page.click("#theme-button")  # auto, light, dark
    assert page.evaluate(background) == dark
    page.reload()
    assert page.evaluate(background) == dark
    page.click("#theme-button")
    assert page.evaluate(background) == light


@pytest.mark.parametrize("width", [360, 800, 1280, 2560])
def test_nothing_is_wider_than_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 700})
    if width < 760:
        page.click(".panes [data-pane=setup]")
    choose(page, "mix-ab", "a")
    add_column(page, "b")
    if width < 760:
        page.click(".panes [data-pane=chat]")
    ask(page, "x" * 300)
    for pane in ("setup", "chat", "look"):
        if page.is_visible(f".panes [data-pane={pane}]"):
            page.click(f".panes [data-pane={pane}]")
        if page.is_visible(f"#{pane}"):
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(f"document.getElementById('{pane}').scrollWidth <= {width}")


def test_without_a_temperature_it_is_the_models(page, server):
    page.fill("#temperature", "")
    asked = []
    page.on("request", lambda request: request.method == "POST" and asked.append(request.post_data_json))
    ask(page)
    assert asked[-1]["temperature"] is None
    assert "seed" in page.inner_text(".answer")
