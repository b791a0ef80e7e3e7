"""What a user does with the page, and what the API says about it."""

from typing import Any

from tests.server.tiny_server import Running

QUESTION = "sort fedcba"
NUM_TOKENS = 12


def choose(page: Any, *names: str, side: str = "a") -> None:
    for name in names:
        page.select_option(f"#link-{side} select", name)


def ask(page: Any, text: str = QUESTION) -> None:
    """Send a prompt, and wait for all answers."""
    from playwright.sync_api import expect

    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".turn .answer")
    expect(page.locator(".streams")).to_have_count(0)


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
