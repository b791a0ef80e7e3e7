"""Control vectors, pyreft's folders and PEFT's IA3: read, run and written as their own libraries do it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from loraplex import MultiLoraModel
from loraplex.cli.app import cli
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import AdapterFormatError, BaseModelMismatchError, ConfigError, UnsupportedAdapterError
from loraplex.residual import (
    GateResidual,
    ReftResidual,
    SteeringVector,
    parse_positions,
    read_control_vector,
    read_ia3,
    read_pyreft,
    read_residual,
    write_control_vector,
    write_residual,
)
from loraplex.residual.conversion import convert_residual, is_convertible
from loraplex.residual.report import describe_residual
from tests.residual.tiny_ia3 import IA3_TARGETS, write_ia3
from tests.residual.tiny_interventions import random_block_vector, random_reft
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

FORMATS = Path(__file__).parent / "formats"
POSITIONS = {
    **{"loreft": "f2+l2", "direft": "l1", "noreft": "f2+l2"},
    **{"consreft": "f2+l2", "lobireft": "f1", "nodireft": "f3+l3"},
}
TOLERANCE = 1e-4  # of the logits' range


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() / (theirs.max() - theirs.min()) < TOLERANCE)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    tensors = load_file(FORMATS / "expected.safetensors")
    with torch.no_grad():
        plain = tiny_model("llama")(tensors["ids"]).logits[0]
    if not close(plain, tensors["logits.base"]):
        pytest.skip("this version of torch draws another tiny model than the fixtures were made with")
    return tensors


@torch.no_grad()
def logits_of(model: MultiLoraModel, ids: Tensor, adapters: str | None) -> Tensor:
    """In a batch with other rows."""
    return model(ids.expand(3, -1), adapters=[None, adapters, None]).logits[1]


# pyreft


@pytest.mark.parametrize("name", POSITIONS)
def test_interventions_of_pyreft_give_its_logits(name: str, expected: dict[str, Tensor], tmp_path: Path) -> None:
    model = MultiLoraModel(tiny_model("llama"))
    model.load_residual(name, FORMATS / name, positions=POSITIONS[name])
    assert close(logits_of(model, expected["ids"], name), expected[f"logits.{name}"])
    assert not close(expected[f"logits.{name}"], expected["logits.base"])
    result = CliRunner().invoke(
        cli, ["convert", str(FORMATS / name), str(tmp_path / name), "--positions", POSITIONS[name]]
    )
    assert result.exit_code == 0, result.output
    model.load_adapter("converted", tmp_path / name)
    assert logits_of(model, expected["ids"], "converted").equal(logits_of(model, expected["ids"], name))
    report = describe_residual(tmp_path / name)
    assert (report.kind, report.r) == ("interventions (ReFT)", 3)
    assert describe_residual(FORMATS / name).num_parameters == report.num_parameters


def test_first_and_last_positions_have_weights_of_their_own() -> None:
    read = read_pyreft(FORMATS / "loreft", parse_positions("f2+l2"))
    assert [(own.block, str(own.positions)) for own in read.interventions] == [
        (0, "f2"),
        (1, "f2"),
        (0, "l2"),
        (1, "l2"),
    ]


def test_positions_that_pyreft_does_not_save_must_be_given() -> None:
    with pytest.raises(ConfigError, match="f7"):
        read_pyreft(FORMATS / "loreft", None)
    with pytest.raises(ConfigError, match="2 interventions at one place"):
        read_pyreft(FORMATS / "loreft", parse_positions("l2"))


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_damaged_folders_of_pyreft_are_refused(tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(FORMATS / "direft", tmp_path / name))

    positions = parse_positions("l1")
    missing = copied("missing")
    next(missing.glob("intkey_layer_0*")).unlink()
    with pytest.raises(AdapterFormatError, match="missing 'intkey_layer_0"):
        read_pyreft(missing, positions)
    unknown = copied("unknown")
    change_config(unknown, intervention_types=["<class 'mine.SomethingIntervention'>"] * 2)
    with pytest.raises(UnsupportedAdapterError, match="SomethingIntervention"):
        read_pyreft(unknown, positions)
    odd = copied("odd")
    torch.save({"weight": torch.zeros(3, 64)}, next(odd.glob("intkey_layer_1*")))
    with pytest.raises(AdapterFormatError, match="a DireftIntervention has"):
        read_pyreft(odd, positions)
    infinite = copied("infinite")
    file = next(infinite.glob("intkey_layer_1*"))
    torch.save({name: tensor * torch.inf for name, tensor in torch.load(file).items()}, file)
    with pytest.raises(AdapterFormatError, match="layer_1"):
        read_pyreft(infinite, positions)

    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, ("raise SystemExit('code of a pickle ran')",)

    code = copied("code")
    torch.save(Code(), next(code.glob("intkey_layer_1*")))
    with pytest.raises(UnsupportedAdapterError, match="could run code"):
        read_pyreft(code, positions)


# Control vectors


def test_a_control_vector_of_repeng_gives_its_logits(expected: dict[str, Tensor]) -> None:
    model = MultiLoraModel(tiny_model("llama"))
    model.load_residual("calm", FORMATS / "control.gguf")
    assert close(logits_of(model, expected["ids"], "calm:0.7"), expected["logits.control"])
    assert not close(expected["logits.control"], expected["logits.base"])
    assert describe_residual(FORMATS / "control.gguf").kind == "steering vector"


def test_a_control_vector_is_written_as_repeng_writes_it(tmp_path: Path) -> None:
    from gguf import GGUFReader

    vector = read_control_vector(FORMATS / "control.gguf")
    write_control_vector(vector, tmp_path / "again.gguf", "llama")

    def content(file: Path) -> tuple[object, ...]:
        reader = GGUFReader(file)
        fields = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
        return fields, [(t.name, t.tensor_type, t.data.tolist()) for t in reader.tensors]

    assert content(tmp_path / "again.gguf") == content(FORMATS / "control.gguf")


def test_vectors_go_to_gguf_and_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    vector = random_block_vector(model, 3, at=[1])
    write_residual(vector, tmp_path / "v")
    run = CliRunner().invoke
    base = ["--base", str(tmp_path / "base")]
    result = run(cli, ["convert", str(tmp_path / "v"), str(tmp_path / "v.gguf"), "--to", "gguf", *base])
    assert result.exit_code == 0, result.output
    assert run(cli, ["convert", str(tmp_path / "v.gguf"), str(tmp_path / "w")]).exit_code == 0
    read = read_residual(tmp_path / "w")
    assert isinstance(read, SteeringVector)
    assert (read.site, read.base, list(read.vectors)) == ("block", None, [1])
    assert read.vectors[1].equal(vector.vectors[1])


@pytest.mark.parametrize("changes", [{"site": "mlp"}, {"at": (0, 1)}, {"positions": parse_positions("l1")}])
def test_what_is_no_control_vector_is_not_written_as_one(changes: dict[str, object], tmp_path: Path) -> None:
    vector = random_block_vector(tiny_model("llama"), 1, **{"at": (1,), **changes})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedAdapterError, match="blocks 1 and up"):
        write_control_vector(vector, tmp_path / "v.gguf", "llama")
    assert not (tmp_path / "v.gguf").exists()


def test_gguf_files_that_are_no_control_vectors_are_refused(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    def written(name: str, architecture: str, tensors: dict[str, Tensor]) -> Path:
        writer = GGUFWriter(tmp_path / name, architecture)
        for tensor, values in tensors.items():
            writer.add_tensor(tensor, values.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    model = MultiLoraModel(tiny_model("llama"))
    for file, error, message in (
        (written("a.gguf", "llama", {"direction.1": torch.ones(64)}), UnsupportedAdapterError, "'llama'"),
        (written("b.gguf", "controlvector", {"other.1": torch.ones(64)}), AdapterFormatError, "other"),
        (written("c.gguf", "controlvector", {}), AdapterFormatError, "sizes"),
        (written("d.gguf", "controlvector", {"direction.1": torch.ones(2, 64)}), UnsupportedAdapterError, "vectors"),
        (
            written("e.gguf", "controlvector", {"direction.1": torch.full((64,), torch.nan)}),
            AdapterFormatError,
            "NaN|nan",
        ),
        (written("f.gguf", "controlvector", {"direction.1": torch.ones(32)}), BaseModelMismatchError, "hidden size"),
        (written("g.gguf", "controlvector", {"direction.9": torch.ones(64)}), BaseModelMismatchError, r"\[9\]"),
    ):
        with pytest.raises(error, match=message):
            model.load_residual("x", file)
    (tmp_path / "h.gguf").write_bytes((FORMATS / "control.gguf").read_bytes()[:200])
    with pytest.raises(AdapterFormatError, match="GGUF"):
        model.load_residual("x", tmp_path / "h.gguf")
    assert model.names() == []


# IA3


@pytest.mark.parametrize("name", IA3_TARGETS)
def test_ia3_of_peft_gives_its_logits_mixed_with_other_rows(name: str, tmp_path: Path) -> None:
    folder, theirs = write_ia3(name, tmp_path / "ia3")
    lora = random_peft_adapter(tiny_model(name), tmp_path / "lora", targets=linear_targets(name), seed=1)
    model = MultiLoraModel(tiny_model(name))
    model.load_adapter("lora", lora)
    model.load_adapter("gates", folder)  # the folder says what it is
    ids = torch.randint(7, 128, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, position_ids=positions, adapters=["lora", "gates", None]).logits
        expected = theirs(ids[1:2, 4:]).logits[0]
        lora_alone = model(ids[:1], adapters=["lora"]).logits[0]
    assert close(ours[1, 4:], expected)
    assert close(ours[0], lora_alone)
    prompt = ids[1, 4:].tolist()
    answer = theirs.generate(input_ids=ids[1:2, 4:], max_new_tokens=6, do_sample=False)[0, 5:].tolist()
    out = model.generate(ids, attention_mask=mask, adapters=["lora", "gates", None], max_new_tokens=6)
    assert out[1, 9:].tolist() == answer
    with Engine(model, EngineConfig(cache_bytes=2**22)) as engine:
        sampling = SamplingParams(max_tokens=6)
        results = engine.generate([Request(prompt, adapters=one, sampling=sampling) for one in ("gates", "lora", None)])
    assert list(results[0].token_ids) == answer


def test_a_gates_weight_goes_from_nothing_to_all_of_it(tmp_path: Path) -> None:
    folder, _ = write_ia3("llama", tmp_path / "ia3")
    model = MultiLoraModel(tiny_model("llama"))
    model.load_residual("gates", folder)
    half = read_ia3(folder)
    halved = GateResidual(
        outputs={path: 1 + (gate - 1) / 2 for path, gate in half.outputs.items()},
        inputs={path: 1 + (gate - 1) / 2 for path, gate in half.inputs.items()},
    )
    model.load_residual("halved", halved)
    ids = torch.tensor([[9, 8, 7, 30]])
    assert close(logits_of(model, ids, "gates:0.5"), logits_of(model, ids, "halved"))
    assert logits_of(model, ids, "gates:0").equal(logits_of(model, ids, None))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, UnsupportedAdapterError, "modules_to_save"),
        ({"new_option": 1}, UnsupportedAdapterError, "new_option"),
        ({"feedforward_modules": ["k_proj"]}, AdapterFormatError, r"\[1, in\]"),
        ({"target_modules": ["k_proj", "v_proj"]}, AdapterFormatError, "doesn't target"),
    ],
)
def test_ia3_that_can_not_be_honoured_is_refused(
    changes: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder, _ = write_ia3("llama", tmp_path / "ia3")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(error, match=message):
        read_ia3(folder)


def test_feedforward_modules_may_be_a_pattern_or_missing(tmp_path: Path) -> None:
    folder, _ = write_ia3("llama", tmp_path / "ia3")
    file = folder / "adapter_config.json"
    expected = read_ia3(folder).inputs.keys()
    for names in (r".*\.down_proj", None):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"feedforward_modules": names}))
        assert read_ia3(folder).inputs.keys() == expected


# Folders of our own


@pytest.mark.parametrize("kind", ["vector", "reft", "gate"])
def test_folders_are_read_as_they_were_written(kind: str, tmp_path: Path) -> None:
    base = tiny_model("llama")
    made: SteeringVector | ReftResidual | GateResidual
    if kind == "vector":
        made = random_block_vector(base, 1, "mlp", parse_positions("f2+l1"))
    elif kind == "reft":
        made = random_reft(base, 2, parse_positions("l3"), subtracts=False)
    else:
        made = GateResidual(outputs={"a.b": torch.rand(3)}, inputs={"c": torch.rand(5)})
    write_residual(made, tmp_path / "r")
    read = read_residual(tmp_path / "r")
    assert type(read) is type(made)
    for ours, theirs in zip(read.tensors(), made.tensors(), strict=True):
        assert ours.equal(theirs)
    if isinstance(made, SteeringVector):
        assert (read.site, read.positions) == (made.site, made.positions)
    if isinstance(made, ReftResidual):
        places = [[(o.block, o.site, o.positions, o.subtracts) for o in r.interventions] for r in (made, read)]
        assert places[0] == places[1]
    assert describe_residual(tmp_path / "r").num_parameters == made.num_parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "f0"},
        {"site": "embedding"},
        {"hidden_size": 2**40},
        {"hidden_size": 63},
        {"layers": []},
        {"kind": "linked"},
        {"more": 1},
        {"format_version": 3},
    ],
)
def test_settings_that_are_damaged_are_refused(changes: dict[str, object], tmp_path: Path) -> None:
    write_residual(random_block_vector(tiny_model("llama"), 1), tmp_path / "r")
    change = tmp_path / "r" / "residual_config.json"
    change.write_text(json.dumps(json.loads(change.read_text()) | changes))
    with pytest.raises((AdapterFormatError, UnsupportedAdapterError)):
        read_residual(tmp_path / "r")


def test_ranks_without_end_are_refused_before_they_are_read(tmp_path: Path) -> None:
    write_residual(random_reft(tiny_model("llama"), 1, parse_positions("l1")), tmp_path / "r")
    file = tmp_path / "r" / "residual_config.json"
    content = json.loads(file.read_text())
    content["interventions"][0]["r"] = 1 << 19
    file.write_text(json.dumps(content))
    model = MultiLoraModel(tiny_model("llama"))
    with pytest.raises(ConfigError, match="hidden states of size 64"):
        model.load_residual("r", tmp_path / "r")
    save_file({}, tmp_path / "r" / "residual_model.safetensors")
    with pytest.raises(AdapterFormatError, match="missing"):
        read_residual(tmp_path / "r")


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300 + ".gguf", "a\0b", ""])
def test_a_name_that_no_file_can_have_is_a_typed_error(name: str, tmp_path: Path) -> None:
    assert not is_convertible(name)
    with pytest.raises(AdapterFormatError):
        convert_residual(Path(name), tmp_path / "to", to_gguf=False)
    with pytest.raises(AdapterFormatError):
        describe_residual(name)
