"""`loraplex scalings`."""

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from loraplex import SpectrConfig
from loraplex.cli.app import cli
from loraplex.xlora.scalings.file import read_scalings
from tests.tiny_models import VOCAB_SIZE, tiny_model
from tests.xlora.mixed_model import mixed_model


@pytest.fixture
def folders(tmp_path):
    """A base model with a tokenizer that knows one word a token, and a mixture."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_model("llama").save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w0").save_pretrained(
        tmp_path / "base"
    )
    mixed_model("llama", tmp_path / "experts").save_mixture("science", tmp_path / "mixture", layout="xlora")
    return tmp_path


def test_pictures_and_scalings_are_written(folders):
    arguments = ["--model", folders / "base", "--mixture", folders / "mixture", "--output", folders / "out", "--raw"]
    prompts = ["--prompt", "w5 w6 w7", "--prompt", "w9 w3", "--max-tokens", "4"]
    result = CliRunner().invoke(cli, ["scalings", *map(str, arguments), *prompts], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = read_scalings(folders / "out" / "scalings.safetensors")
    assert [row.num_tokens for row in rows] == [6, 5]
    assert rows[0].token_ids[:3] == (5, 6, 7)
    for name in ("tokens-0.png", "text-0.png", "tokens-1.gif", "layers.png"):
        with Image.open(folders / "out" / name) as image:
            assert image.width > 100
    with Image.open(folders / "out" / "tokens-1.gif") as image:
        assert image.n_frames == 5


def test_gates_of_routers_are_drawn_too(folders):
    model = mixed_model("llama", folders / "again")
    model.create_mixture("routed", ["0", "1"], SpectrConfig())
    model.save_mixture("routed", folders / "routed")
    arguments = ["--model", folders / "base", "--mixture", folders / "routed", "--output", folders / "out", "--raw"]
    options = ["--prompt", "w5 w6 w7", "--max-tokens", "3"]
    result = CliRunner().invoke(cli, ["scalings", *map(str, arguments), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (row,) = read_scalings(folders / "out" / "scalings.safetensors")
    assert (row.num_tokens, row.experts) == (5, ("mixture/0", "mixture/1"))
    assert (folders / "out" / "tokens-0.gif").exists()


def test_experts_can_come_from_elsewhere(folders):
    experts = [part for i in range(3) for part in ("--expert", f"e{i}={folders / 'experts' / str(i)}")]
    arguments = ["--model", folders / "base", "--mixture", folders / "mixture", "--output", folders / "out", "--raw"]
    options = ["--prompt", "w5 w6", "--max-tokens", "2", "--no-animate", *experts]
    result = CliRunner().invoke(cli, ["scalings", *map(str, arguments), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert read_scalings(folders / "out" / "scalings.safetensors")[0].experts == ("e0", "e1", "e2")
    assert not (folders / "out" / "tokens-0.gif").exists()
