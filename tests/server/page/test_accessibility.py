"""axe-core finds nothing serious, and the experts' colours can be told apart and read, in both themes."""

from itertools import combinations
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.server.page.driver import add_column, ask, choose, finished, tokens

Color = tuple[float, float, float]
SCREENS = [
    ("light", 1280),
    ("dark", 390),
    pytest.param("dark", 1280, marks=pytest.mark.slow),
    pytest.param("light", 390, marks=pytest.mark.slow),
]


def serious(page: Any) -> list[str]:
    """What axe finds of impact serious or critical, each with its first element."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    bad = [one for one in found if one["impact"] in ("serious", "critical")]
    firsts = [one["nodes"][0] for one in bad]
    return [
        f"{one['id']}: {first['html'][:200]} {first.get('failureSummary', '')[:300]}"
        for one, first in zip(bad, firsts, strict=True)
    ]


@pytest.mark.parametrize(("colors", "width"), SCREENS)
def test_axe_finds_nothing_serious(page, colors, width):
    page.emulate_media(color_scheme=colors, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 800})

    def pane(name: str) -> None:
        if page.is_visible(f".panes [data-pane={name}]"):
            page.click(f".panes [data-pane={name}]")

    pane("setup")
    choose(page, "mix-ab")
    add_column(page, "a", "b")
    page.click("text=Stop texts and schema")
    page.check("#capture")  # shows its fields
    assert serious(page) == [], "setup"
    page.uncheck("#capture")
    pane("chat")
    ask(page)
    page.click("text=Steer")
    page.locator(".steering textarea").evaluate("(one) => { one.focus(); one.setSelectionRange(0, 4); }")
    page.click("text=Mark the selection")
    tokens(page)[2].click()
    page.locator(".prompt-read summary").click()
    assert serious(page) == [], "chat"
    pane("look")
    page.click("text=Answer again with attention")
    finished(page)
    page.wait_for_selector("canvas.overview")
    assert serious(page) == [], "looking inside"
    page.click("text=Enlarge")
    assert serious(page) == [], "a dialog"
    page.keyboard.press("Escape")
    pane("chat")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page)
    expect(page.locator(".refusal").first).to_be_visible()
    assert serious(page) == [], "an error"


def looks(page: Any, count: int) -> list[dict[str, Any]]:
    script = "async (count) => (await import('/page/palette.js')).expertLooks(count)"
    found: list[dict[str, Any]] = page.evaluate(script, count)
    return found


def linear(color: str) -> Color:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return red, green, blue


def contrast(one: Color, other: Color) -> float:
    """WCAG 2.1's, of linear colours."""
    light, dark = sorted((0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def oklab(color: Color) -> Color:
    """Ottosson's perceptual space."""
    red, green, blue = color
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    middle = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return (
        0.2104542553 * long + 0.793617785 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.428592205 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.808675766 * short,
    )


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_twelve_experts_have_colours_that_are_distinct_and_stand_out(page, colors):
    page.emulate_media(color_scheme=colors)
    found = [linear(look[colors]) for look in looks(page, 12)]
    grounds = [
        page.evaluate(
            """(name) => { const one = document.createElement("span"); one.style.color = `var(${name})`;
            document.body.append(one); return getComputedStyle(one).color; }""",
            name,
        )
        for name in ("--bg", "--surface", "--sunken")
    ]
    for ground in grounds:
        channels = [int(part) for part in ground.removeprefix("rgb(").removesuffix(")").split(",")]
        background = linear("#" + "".join(f"{channel:02x}" for channel in channels))
        assert min(contrast(color, background) for color in found) >= 4.5
    for one, other in combinations(map(oklab, found), 2):
        assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 0.095


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_text_is_readable_on_every_experts_token(page, colors):
    """As it is painted: the text's colour against the brightest or darkest ground below it."""
    page.emulate_media(color_scheme=colors)
    pixels = page.evaluate(
        """async () => {
            const { expertLooks, wear } = await import("/page/palette.js");
            return expertLooks(12).map((look) => {
                const span = document.createElement("span");
                span.className = "token led";
                wear(span, look);
                span.style.setProperty("--margin", "1");
                document.getElementById("turns").append(span);
                const style = getComputedStyle(span);
                const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
                const read = (...fills) => {
                    for (const fill of fills) { canvas.fillStyle = fill; canvas.fillRect(0, 0, 1, 1); }
                    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
                const ground = getComputedStyle(document.documentElement).backgroundColor;
                return [read(style.color), read(ground, style.backgroundColor)]; }); }"""
    )
    for text, ground in pixels:
        as_linear = [linear("#" + "".join(f"{channel:02x}" for channel in color)) for color in (text, ground)]
        assert contrast(*as_linear) >= 4.5


def test_experts_beyond_twelve_wear_patterns(page):
    found = looks(page, 40)
    assert len({(look["light"], look["pattern"]) for look in found}) == 40
    assert [found[place]["pattern"] for place in (0, 11, 12, 24, 36)] == [0, 0, 1, 2, 3]
    kinds = page.evaluate(
        """async () => {
            const { canvasFill, expertLooks, wear } = await import("/page/palette.js");
            const draw = document.createElement("canvas").getContext("2d");
            return [0, 12, 24, 36].map((place) => {
                const look = expertLooks(40)[place];
                const swatch = document.createElement("span");
                swatch.className = "swatch";
                wear(swatch, look);
                document.body.append(swatch);
                draw.fillStyle = canvasFill(draw, look);
                draw.fillRect(0, 0, 12, 12);
                const data = new Uint32Array(draw.getImageData(0, 0, 12, 12).data.buffer);
                return [getComputedStyle(swatch).backgroundImage, new Set(data).size > 1]; }); }"""
    )
    assert [is_patterned for _, is_patterned in kinds] == [False, True, True, True]
    assert kinds[0][0] == "none"
    assert len({image for image, _ in kinds}) == 4


def test_on_a_phone_the_choice_and_the_tapped_token_stand_where_one_types(page):
    page.set_viewport_size({"width": 390, "height": 780})
    page.click(".panes [data-pane=setup]")
    choose(page, "mix-ab")
    add_column(page, "a")
    page.click(".panes [data-pane=chat]")
    assert page.locator("#chosen-button code").all_text_contents() == ["mix-ab", "a"]
    assert page.is_hidden("#tapped")
    ask(page)
    tokens(page)[1].click()
    expect(page.locator("#tapped")).to_contain_text("probability")
    box, field = page.locator("#tapped").bounding_box(), page.locator("#prompt").bounding_box()
    assert 0 < field["y"] - box["y"] < 120
    assert field["y"] + field["height"] < 780
    page.click("#tapped")
    assert page.is_visible("#token-panel .token-head")
    page.click(".panes [data-pane=chat]")
    page.click("#chosen-button")
    assert page.is_visible("#columns")
