"""Training files: what is read, and what is refused with file and line."""

from pathlib import Path

import pytest

from loraplex.errors import DatasetError
from loraplex.training.data.records import read_records


def write(folder: Path, text: str) -> Path:
    path = folder / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_the_three_forms_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"text": "a\\u2028b"}\n\n{"prompt": "", "completion": "c", "id": 7}\n'
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n',
    )
    text, completion, messages = read_records(path)
    assert text.text == "a\u2028b"
    assert (completion.prompt, completion.completion) == ("", "c")
    assert messages.messages is not None
    assert messages.messages[1] == {"role": "assistant", "content": "ho"}
    assert [record.place for record in (text, completion, messages)] == [f"{path}:{line}" for line in (1, 3, 4)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a JSON list"),
        ('{"question": "a"}', r"the keys \['question'\]"),
        ('{"text": "a", "prompt": "b"}', "different forms"),
        ('{"text": 3}', "text is 3"),
        ('{"text": ""}', "text is empty"),
        ('{"prompt": "a"}', "completion is None"),
        ('{"prompt": "a", "completion": ""}', "completion is empty"),
        ('{"messages": []}', "must be a list"),
        ('{"messages": "hi"}', "must be a list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'no message has the role "assistant"'),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "message 0"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 0 has the content None"),
    ],
)
def test_names_file_and_line_of_a_record_that_cannot_be_used(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DatasetError, match=message) as caught:
        read_records(path)
    assert f"{path}:2" in str(caught.value)


def test_refuses_missing_empty_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(DatasetError, match="has no records"):
        read_records(write(tmp_path, "\n \n"))
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DatasetError, match="UTF-8"):
        read_records(tmp_path / "data.jsonl")
    with pytest.raises(DatasetError, match="can't be read"):
        read_records(tmp_path)
