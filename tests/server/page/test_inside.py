"""Looking inside: other tokens, experts over the answer, all heads at a glance, steering, links to a view."""

import base64
import json
import math

import numpy as np
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
    index_of,
    reload,
    texts,
    tokens,
)
from tests.server.page.test_answers import array


def test_the_likeliest_tokens_of_a_place(page, server):
    choose(page, "a")
    ask(page)
    chosen = tokens(page)[2]
    chosen.click()
    page.wait_for_selector(".alternatives li")
    content = api_answer(server, "a", logprobs=True, top_logprobs=5)["logprobs"]["content"]
    expected = [math.exp(one["logprob"]) for one in content[index_of(chosen)]["top_logprobs"]]
    shown = [float(text) for text in page.locator(".alternatives .number").all_text_contents()]
    np.testing.assert_allclose(shown, expected, atol=6e-4)
    leads = page.text_content(".alternatives .leads .bar-name")
    assert leads.replace("␣", " ") == chosen.text_content()


def test_the_share_of_each_expert_over_the_answer(page, server):
    choose(page, "mix-ab")
    ask(page)
    (told,) = api_answer(server, "mix-ab", return_scalings=True)["scalings"]
    chosen = tokens(page)[1]
    chosen.click()
    page.wait_for_selector(".shares li")
    num_read = len(tokens(page, ".prompt-read"))
    means = np.maximum(array(told["values"]).mean(axis=1)[num_read:], 0)
    expected = (means / means.sum(axis=1, keepdims=True)).mean(axis=0)
    shown = [float(text.removesuffix(" %")) / 100 for text in page.locator(".shares .number").all_text_contents()]
    np.testing.assert_allclose(shown, expected, atol=0.0051)
    assert "Share of each expert over the answer: a" in page.get_attribute("canvas.share", "aria-label")
    page.focus("canvas.share")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token-head")).to_contain_text(f"token {index_of(chosen) + 2},")
    box = page.locator("canvas.share").bounding_box()
    page.mouse.click(box["x"] + 2, box["y"] + 30)
    expect(page.locator(".token-head")).to_contain_text("token 1,")


def test_attention_of_all_layers_and_heads_at_a_glance(page, server):
    ask(page)
    tokens(page)[3].click()
    page.click("text=Answer again with attention")
    page.wait_for_selector("canvas.overview")
    captured = api_answer(server, "tiny", capture_attention={"queries": "generated"})["captured_attention"]
    weights = array(captured["weights"]).astype(np.float32)
    layers, heads = weights.shape[:2]
    index = index_of(page.locator(".token.held"))
    seen = captured["query_positions"][index] + 1
    canvas = page.locator("canvas.overview")
    box = canvas.bounding_box()
    width, height = (box["width"] - 24) / heads, (box["height"] - 13) / layers
    layer, head = 1, heads - 1
    page.mouse.click(box["x"] + 24 + (head + 0.5) * width, box["y"] + 13 + (layer + 0.5) * height)
    assert page.locator("[aria-label=Layer]").evaluate("(one) => one.selectedOptions[0].text") == f"layer {layer}"
    assert page.locator("[aria-label=Head]").evaluate("(one) => one.selectedOptions[0].text") == f"head {head}"
    row = weights[layer, head, index, 1:seen]
    assert float(page.locator(".looked-list .number").first.text_content()) == pytest.approx(row.max(), abs=6e-4)
    most = page.locator(".attention .readout").text_content()
    assert most.startswith(f"layer {layer} head {head} · {100 * row.max():.0f} % on ")
    canvas.focus()
    page.keyboard.press("ArrowUp")
    assert page.input_value("[aria-label=Layer]") == "0"
    page.keyboard.press("Escape")
    assert page.input_value("[aria-label=Head]") == ""
    page.click("text=Enlarge")
    large = page.locator("dialog canvas.overview")
    assert large.bounding_box()["width"] > 2 * box["width"]
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)


def test_the_overview_is_painted_from_the_weights(page):
    """A head that looks at one place has one bright pixel column there; another head's cell doesn't."""
    alpha = page.evaluate(
        """async () => {
            const { AttentionOverview } = await import("/page/overview.js");
            const [layers, heads, queries, keys] = [2, 2, 4, 8];
            const data = new Float32Array(layers * heads * queries * keys).fill(0.01);
            for (let query = 0; query < queries; query += 1) data[((1 * heads + 0) * queries + query) * keys + 6] = 1;
            const attention = { layers: [0, 1], heads: [0, 1], queries: [4, 5, 6, 7], tokens: [..."abcdefgh"],
                shape: [layers, heads, queries, keys], data };
            const view = new AttentionOverview(attention, 3, { layer: "", head: "" }, () => {});
            document.getElementById("token-panel").replaceChildren(view.element);
            view.draw();
            const canvas = view.element.querySelector("canvas");
            const draw = canvas.getContext("2d");
            const at = (layer, head, across) => draw.getImageData(
                Math.round((24 + (head + across) * view.cell.width) * devicePixelRatio),
                Math.round((13 + (layer + 0.3) * view.cell.height) * devicePixelRatio), 1, 1).data[3];
            return [at(1, 0, 0.79), at(1, 0, 0.3), at(1, 1, 0.79), at(1, 1, 0.3)]; }"""
    )
    assert alpha[0] > 240
    assert alpha[1] < 80
    assert alpha[2] == alpha[3], "where all weights are the same, all is as bright"


def test_an_answer_too_large_to_capture_can_be_had_by_the_mean_of_heads(page):
    page.route(
        "**/v1/chat/completions",
        lambda route: (
            route.continue_()
            if route.request.post_data_json.get("capture_attention", {}).get("reduce") == "mean"
            or not route.request.post_data_json.get("capture_attention")
            else route.fulfill(status=400, json={"error": {"message": "too many bytes", "code": "too_large"}})
        ),
    )
    ask(page)
    tokens(page)[3].click()
    page.click("text=Answer again with attention")
    page.click("text=With the mean of the heads")
    page.wait_for_selector("canvas.overview")
    assert page.is_disabled("[aria-label=Head]")


def test_steering_by_marking_text_shows_what_changed_beside(page, server):
    choose(page, "a")
    add_column(page, "b")
    sent = bodies(page)
    ask(page)
    page.click("text=Steer")
    area = page.locator(".steering textarea")
    page.keyboard.press("Control+Home")
    page.keyboard.press("ArrowDown")
    page.click("text=Mark the selection")
    assert "Select a part of the question first" in page.inner_text(".steering .problem")
    area.evaluate("(one) => { one.focus(); one.setSelectionRange(5, 8); }")
    page.click("text=Mark the selection")
    slider = page.locator("[aria-label='Strength of fed']")
    slider.focus()
    page.keyboard.press("Home")
    page.fill("[aria-label='Strength of fed, as a number']", "9.5")
    assert slider.input_value() == "9.5"
    page.select_option(".steering select", label="b")
    page.click("text=Answer beside it, steered")
    finished(page, 3)
    assert sent[-1] == sent[1] | {"steer": [{"text": "fed", "strength": 9.5}]}
    expected = [
        api_answer(server, "a")["message"]["content"],
        api_answer(server, "b")["message"]["content"],
        api_answer(server, "b", steer=[{"text": "fed", "strength": 9.5}])["message"]["content"],
    ]
    assert texts(page) == expected
    assert expected[1] != expected[2], "steering changes something, or this shows nothing"
    note = page.locator(".answer").nth(2).locator(".changes")
    assert note.inner_text().startswith("Differs from answer 2")
    assert page.locator(".answer").nth(2).locator(".differs").count() > 0
    assert page.locator(".steered").inner_text() == "steered: “fed” × 9.5"  # noqa: RUF001


def test_marks_of_a_steered_answer_are_told_from_the_same_answer_unsteered(page):
    answer_with(page, "one two three", "one two four", steered="one six four")
    choose(page, "a")
    add_column(page, "b")
    ask(page)
    page.click("text=Steer")
    page.locator(".steering textarea").evaluate("(one) => one.setSelectionRange(0, 4)")
    page.click("text=Mark the selection")
    page.select_option(".steering select", label="b")
    page.click("text=Answer beside it, steered")
    finished(page, 3)
    marked = page.locator(".answer").nth(2).locator(".differs").all_text_contents()
    assert [text.strip() for text in marked] == ["six"]


def test_a_link_opens_the_same_view_again(page, server, context):
    choose(page, "mix-ab")
    add_column(page, "a")
    page.fill("#temperature", "1")
    page.fill("#system", "Be é.")
    page.select_option("#context", "own")
    ask(page)
    ask(page, "and?")
    page.locator(".answer .token").last.click()  # random seeds: an answer may have few tokens
    page.click("text=Answer again with attention")
    page.wait_for_selector("canvas.overview")
    page.select_option("[aria-label=Layer]", "1")
    page.select_option("[aria-label=Head]", "0")
    before = (texts(page), page.inner_text("#token-panel"))
    page.click("#copy-link")
    address = page.inner_text("dialog pre")
    assert address.startswith(f"{server.url}/#view=")
    with tab(context, server) as other:
        sent = bodies(other)
        other.goto(address)
        other.reload()
        other.wait_for_selector("text=This link opens")
        assert sent == [], "an address alone asks nothing"
        assert other.input_value("#system") == "Be é."
        assert other.locator("#columns .model-text").all_text_contents() == ["mix-ab", "a"]
        other.uncheck("#formatted")
        other.click("text=Ask for the 4 answers")
        finished(other, 4)
        other.wait_for_selector("canvas.overview")
        assert (texts(other), other.inner_text("#token-panel")) == before
        assert other.url == f"{server.url}/"


@pytest.mark.parametrize("damage", ["cut", "version", "types"])
def test_a_damaged_link_says_so(page, server, damage):
    view = {"version": 2 if damage == "version" else 1, "turns": [{"user": 1}]}
    text = base64.urlsafe_b64encode(json.dumps(view).encode()).decode().rstrip("=")
    page.goto(f"{server.url}/#view={text[:-6] if damage == 'cut' else text}")
    reload(page)
    expect(page.locator("#notice")).to_contain_text("The link to a view is")
    ask(page, QUESTION)
    assert texts(page)[0]
