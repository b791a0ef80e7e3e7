"""Damage that knows the formats: JSON settings, JSON lines, safetensors headers, bytes, and the files themselves."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**64, 10**18, 10**307, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1e-40, 1e-300, 1e30, 1e39, 1e300, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        "a",
        "none",
        "all-linear",
        "linear",
        "x" * 100_000,
        "é",
        "\ud800",
        "\0",
        "../..",
        "/etc/passwd",
        "~root",
        "0",
    ),
    *(".*", "(.*)*(.*)*(.*)*!", "(?=.)(.*)*(.*)*!", "[", "^(?!.*vision).*", r"(a)\1", "(" * 2000, "(?i)x", "a{99999}"),
    *([], [[]], ["q_proj"], [0], [1, 1], [-1], [None], list(range(2000)), {}, {"a": {}}, {".*": 4}, {"(.*)*(.*)*!": 4}),
    *({"q_proj": 10**6}, [[[[[[[[]]]]]]]], ["(.*)*!"], {"0": "a", "1": "b"}, ["a", "a"], ["a", "../b"]),
]
NAMES = ["a_new_setting", "r", "layers", "adapters", "__class__", "peft_type", "x" * 5000, "", "\u2028"]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "F128", "", None, 3]
SHAPES: list[Any] = [
    *([], [0], [1], [4, 0], [0, 64], [2**40], [2**31, 2**31], [-1, 64], [4.5, 64], ["4", 64], None, [10**7, 64]),
    *([64, 4], [1, 1, 1, 1], [1] * 1000, [2**63, 2**63]),
]


def mutate_json(draw: random.Random, text: str) -> str:
    """A value changed, removed, added or wrapped; or the text itself damaged."""
    if draw.random() < 0.15:
        return mutate_text(draw, text)
    content = json.loads(text)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        content = _changed(draw, content)
    return json.dumps(content)


def mutate_text(draw: random.Random, text: str) -> str:
    place = draw.randrange(len(text) + 1)
    return draw.choice(
        [
            lambda: text[:place],
            lambda: "",
            lambda: "\ufeff" + text,
            lambda: "[" * 5000 + text,
            lambda: (
                text[:place] + draw.choice(['"', "{", "]", "NaN", "1e999", "\\ud800", "\0", "9" * 5000]) + text[place:]
            ),
            lambda: text + text,
            lambda: "null",
            lambda: '{"a":' * 300 + "1" + "}" * 300,
        ]
    )()


def _changed(draw: random.Random, content: Any) -> Any:
    """One change at a random place, deeper places with the same chance as high ones."""
    if isinstance(content, dict) and content:
        key = draw.choice(list(content))
        kind = draw.random()
        if kind < 0.35 and isinstance(content[key], dict | list):
            return content | {key: _changed(draw, content[key])}
        if kind < 0.45:
            return {other: value for other, value in content.items() if other != key}
        if kind < 0.55:
            return content | {draw.choice(NAMES): draw.choice(VALUES)}
        if kind < 0.6:
            return content | {key: [content[key]]}
        if kind < 0.65:
            return content | {key: str(content[key])}
        return content | {key: draw.choice(VALUES)}
    if isinstance(content, list) and content:
        changed = list(content)
        place = draw.randrange(len(changed))
        if draw.random() < 0.3:
            del changed[place]
        elif draw.random() < 0.3:
            changed.append(copy.deepcopy(changed[place]))
        else:
            changed[place] = _changed(draw, changed[place])
        return changed
    return draw.choice(VALUES)


def mutate_tensors(draw: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header, other values, or other bytes."""
    size = int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    kind = draw.random()
    if kind < 0.15:
        return mutate_bytes(draw, content)
    if kind < 0.3:  # other values: NaN and the largest
        place = draw.randrange(max(1, len(tensors) - 8))
        special = draw.choice(
            [b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\xff" * 8, b"\0\0\x80\xff", os.urandom(0) + b"\1" * 4]
        )
        return content[: 8 + size] + tensors[:place] + special + tensors[place + len(special) :]
    name = draw.choice(names) if names else "x"
    entry = header.get(name, {})
    if kind < 0.4:
        header[draw.choice([name + "x", "x" * 2000, "", "\n", "é", name.replace("lora_A", "lora_B")])] = header.pop(
            name, {}
        )
    elif kind < 0.5:
        header.pop(name, None)
    elif kind < 0.6:
        entry["shape"] = draw.choice(SHAPES)
    elif kind < 0.7:
        entry["dtype"] = draw.choice(DTYPES)
    elif kind < 0.8:
        entry["data_offsets"] = draw.choice(
            [[0, 0], [-1, 4], [0, 2**62], [4, 0], [], None, [0, len(tensors)], [1.5, 3]]
        )
    elif kind < 0.9:
        header["__metadata__"] = _changed(draw, header.get("__metadata__", {"format": "pt"}))
    else:
        return with_header(json.dumps(_changed(draw, header)).encode(), tensors)
    if kind < 0.7 and draw.random() < 0.5:  # a header that agrees with itself, and a file with holes for its tensors
        return consistent(header, tensors)
    return with_header(json.dumps(header).encode(), tensors)


def consistent(header: dict[str, Any], tensors: bytes) -> bytes:
    """Lay the tensors out one after the other as dtype and shape say, where that is not too much."""
    sizes, start = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "BOOL": 1, "F8_E4M3": 1}, 0
    for name, entry in header.items():
        if name == "__metadata__" or not isinstance(entry, dict) or "shape" not in entry:
            continue
        try:
            count = 1
            for side in entry["shape"]:
                count *= int(side)
            num_bytes = count * sizes[entry["dtype"]]
        except (TypeError, KeyError, ValueError):
            return with_header(json.dumps(header).encode(), tensors)
        entry["data_offsets"] = [start, start + num_bytes]
        start += num_bytes
    if not 0 <= start <= 1 << 28:
        return with_header(json.dumps(header).encode(), tensors)
    return with_header(
        json.dumps(header).encode(), (tensors + bytes(max(0, min(start, 1 << 24) - len(tensors))))[:start]
    )


def with_header(header: bytes, tensors: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + tensors


def mutate_bytes(draw: random.Random, content: bytes) -> bytes:
    place = draw.randrange(len(content) + 1)
    return draw.choice(
        [
            lambda: content[:place],
            lambda: b"",
            lambda: content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :],
            lambda: content[:place] + bytes(draw.randrange(256) for _ in range(8)) + content[place:],
            lambda: content + content,
            lambda: draw.choice([2**60, 0, 1, 2**24]).to_bytes(8, "little") + content[8:],
            lambda: bytes(draw.randrange(256) for _ in range(200)),
        ]
    )()


def mutate_lines(draw: random.Random, text: str) -> str:
    """JSON lines, one or two of them changed."""
    lines = text.splitlines()
    for place in draw.sample(range(len(lines)), draw.choice([1, 1, 2])):
        lines[place] = mutate_json(draw, lines[place])
    return draw.choice(["\n", "\n", "\n", "\r\n", "\n\n"]).join(lines)


def mutate_file(draw: random.Random, file: Path) -> None:
    """The file is gone, or something else than a file."""

    def replaced(make: Callable[[], object]) -> None:
        file.unlink()
        make()

    draw.choice(
        [
            lambda: file.unlink(),
            lambda: replaced(file.mkdir),
            lambda: replaced(lambda: file.symlink_to(file.name)),
            lambda: replaced(lambda: file.symlink_to("/dev/zero")),
            lambda: replaced(lambda: os.mkfifo(file)),
            lambda: os.truncate(file, 1 << 33),
            lambda: shutil.move(file, file.with_name(file.name + ".bin")),
        ]
    )()


def mutate(draw: random.Random, file: Path) -> None:
    """Damage one file in a way that belongs to its format."""
    if draw.random() < 0.05:
        mutate_file(draw, file)
    elif file.suffix == ".safetensors":
        file.write_bytes(mutate_tensors(draw, file.read_bytes()))
    elif file.suffix in (".bin", ".gguf"):
        file.write_bytes(mutate_bytes(draw, file.read_bytes()))
    elif file.suffix == ".jsonl":
        file.write_text(mutate_lines(draw, file.read_text()), encoding="utf-8", errors="surrogatepass")
    else:
        file.write_text(mutate_json(draw, file.read_text()), encoding="utf-8", errors="surrogatepass")
