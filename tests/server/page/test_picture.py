"""The documentation's picture of the page can be made again."""

import pytest
from PIL import Image


@pytest.mark.slow
@pytest.mark.needs("chromium")
def test_the_picture_shows_a_coloured_answer(tmp_path, smollm2):
    from scripts.page_picture import SIZE, take

    take(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (SIZE["width"], SIZE["height"])
        colors = picture.convert("RGB").getcolors(2**20)
    assert (tmp_path / "page.png").stat().st_size < 300_000
    quantum = sum(count for count, (red, green, blue) in colors if 140 < red < 200 and 25 < blue - red < 50)
    assert quantum > 5_000, "the molecule's tokens are the quantum expert's"
