"""What a user does with the page, and what the API says about it."""

import json
import re
from typing import Any

from tests.server.tiny_server import Running

QUESTION = "sort fedcba"
NUM_TOKENS = 12


def set_up(page: Any) -> None:
    """Greedy, short answers, texts as they are: a page that has just been opened samples with a random seed."""
    page.wait_for_selector("#link-a option[value=mix-ab]", state="attached")
    page.fill("#max-tokens", str(NUM_TOKENS))
    page.fill("#temperature", "0")
    page.uncheck("#formatted")


def reload(page: Any) -> None:
    page.reload()
    set_up(page)


def choose(page: Any, *names: str, side: str = "a") -> None:
    for name in names:
        page.select_option(f"#link-{side} select", name)


def add_column(page: Any, *names: str) -> None:
    """A column more, with these names in its link."""
    page.click("#add-column")
    for name in names:
        page.locator("#columns .column").last.locator("select").select_option(name)


def bodies(page: Any) -> list[dict[str, Any]]:
    """What the page sends to the API from now on: grows."""
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: request.url.endswith("/completions") and sent.append(request.post_data_json))
    return sent


def answer_with(page: Any, *texts: str, steered: str = "") -> None:
    """Let the API seem to answer with these texts, in the order of the requests; steered ones with another."""
    left = list(texts)

    def fulfill(route: Any) -> None:
        text = steered if route.request.post_data_json.get("steer") else left.pop(0)
        pieces = re.findall(r"\s*\S+|\s+$", text)
        content = [{"token": piece, "logprob": -0.5, "bytes": [], "top_logprobs": []} for piece in pieces]
        choice = {"index": 0, "delta": {"content": text}, "logprobs": {"content": content}, "finish_reason": "stop"}
        route.fulfill(
            body=f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n", content_type="text/event-stream"
        )

    page.route("**/v1/chat/completions", fulfill)


def finished(page: Any, count: int = 0) -> None:
    """Wait until nothing streams, with `count` answers where that is given."""
    from playwright.sync_api import expect

    if count:
        expect(page.locator(".answer")).to_have_count(count)
    expect(page.locator(".streams")).to_have_count(0)


def ask(page: Any, text: str = QUESTION) -> None:
    """Send a prompt, and wait for all answers."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".turn .answer")
    finished(page)


def texts(page: Any) -> list[str]:
    """Of the answers, the prompts as read left out."""
    return [part.text_content() for part in page.locator(".answer > .answer-text").all()]


def tokens(page: Any, part: str = ".answer > .answer-text") -> list[Any]:
    """The elements of the tokens that have a text."""
    found: list[Any] = page.locator(f"{part} .token").all()
    return found


def index_of(token: Any) -> int:
    """Its place among all tokens; a special token has no text in an answer, and no element."""
    return int(token.get_attribute("data-index"))


def api_answer(server: Running, model: str, key: str | None = None, **fields: Any) -> dict[str, Any]:
    """The choice that the API gives to QUESTION."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}]}
    answer = server.http(key).post(
        "/v1/chat/completions", json=body | {"temperature": 0, "max_tokens": NUM_TOKENS} | fields
    )
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice
