import bz2
import gzip
import json
import lzma
from collections.abc import Callable

import pytest

from gradsurgery.data.documents import read_rows
from gradsurgery.errors import DataError

LINES = "".join(json.dumps({"id": f"d{i}", "text": f"ñandú {i} " * 20}, ensure_ascii=False) + "\n" for i in range(30))
COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize("ending", ["", *COMPRESS])
def test_json_lines_read_the_same_in_every_compression(tmp_path, ending):
    path = tmp_path / f"es.jsonl{ending}"
    path.write_bytes(COMPRESS.get(ending, bytes)(LINES.encode()))
    rows = read_rows(path)
    assert [row["id"] for row in rows] == [f"d{i}" for i in range(30)]
    assert rows[3]["text"].startswith("ñandú 3")


@pytest.mark.parametrize("ending", list(COMPRESS))
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.97])
def test_truncated_archives_are_refused(tmp_path, ending, kept):
    raw = COMPRESS[ending](LINES.encode())
    path = tmp_path / f"es.jsonl{ending}"
    path.write_bytes(raw[: int(len(raw) * kept)])
    with pytest.raises(DataError, match=r"es\.jsonl.* is truncated or damaged"):
        read_rows(path)


def test_truncated_json_names_the_line(tmp_path):
    path = tmp_path / "es.jsonl"
    path.write_text(LINES[:-40], encoding="utf-8")
    with pytest.raises(DataError, match=r"es\.jsonl, line 30: no JSON object .*truncated"):
        read_rows(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n\n", "is empty"),
        ("año".encode("latin-1"), "is not UTF-8 .byte 1"),
        ("año".encode()[:2], "is not UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_unusable_content(tmp_path, content, message, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("ending", ["", *COMPRESS])
def test_zero_bytes_are_no_document(tmp_path, ending):
    (tmp_path / f"x.txt{ending}").write_bytes(b"")
    with pytest.raises(DataError, match=r"is empty|truncated"):
        read_rows(tmp_path / f"x.txt{ending}")


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        read_rows(tmp_path / "nothing.txt")
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match="format that is not read; read are"):
        read_rows(tmp_path / "x.csv")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="line 1: expected a JSON object, got list"):
        read_rows(tmp_path / "list.jsonl")


def test_text_splits_at_blank_lines_or_at_marks(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\nmore of one\r\n \t\r\n\n\ntwo\n")
    assert read_rows(path) == [{"id": "0", "text": "one\nmore of one"}, {"id": "1", "text": "two"}]
    path.write_text("one\n\nmore of one\n<|endoftext|>\ntwo<|endoftext|>three\n<|endoftext|>\n")
    assert [row["text"] for row in read_rows(path)] == ["one\n\nmore of one", "two", "three"]


def test_rows_without_an_id_get_their_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n{"id": 7, "text": "c"}\n')
    assert [row["id"] for row in read_rows(path)] == ["0", "2", "7"]
    path.write_text('{"text": "line\u2028separator"}\n', encoding="utf-8")
    assert read_rows(path)[0]["text"] == "line\u2028separator"
