"""The translation script: nothing is lost between pieces, interruptions cost nothing, arguments are checked first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurgery.data import translate as module
from gradsurgery.data.translate import main, resume, translate_rows
from gradsurgery.errors import DataError

TEXT = st.text(alphabet="ab .!\n", max_size=60)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXT, max_size=4), size=st.integers(1, 3), longest=st.integers(1, 20))
def test_pieces_put_together_are_the_text(texts: list[str], size: int, longest: int) -> None:
    seen: list[str] = []

    def translate(pieces: list[str]) -> list[str]:
        assert 0 < len(pieces) <= size
        seen.extend(pieces)
        return [piece.replace("a", "x") for piece in pieces]

    found = list(translate_rows([{"text": t} for t in texts], translate, size, longest))
    for text, row in zip(texts, found, strict=True):
        assert row["text"].split() == text.replace("a", "x").split() and row["text"].count("\n") == text.count("\n")
    assert all(len(piece) <= longest or not module._SENTENCE.search(piece) for piece in seen)


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "en.jsonl", tmp_path / "out" / "es.jsonl"
    source.write_text("".join(json.dumps({"text": f"Story {k}."}) + "\n" for k in range(5)))
    monkeypatch.setattr(module, "model_translator", lambda *a, **k: lambda pieces: [p.upper() for p in pieces])
    arguments = ["--source", str(source), "--model", "any", "--out", str(out)]
    main([*arguments, "--limit", "3"])
    whole = out.read_bytes()
    with open(out, "ab") as file:
        file.write(b'{"id": "3", "te')
    assert resume(out) == 3 and out.read_bytes() == whole
    main(arguments)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"id": str(k), "text": f"STORY {k}."} for k in range(5)
    ]


def test_arguments_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    good = {
        "--source": str(tmp_path / "en.jsonl"),
        "--model": str(tmp_path / "model"),
        "--out": str(tmp_path / "es.jsonl"),
    }
    (tmp_path / "en.jsonl").write_text('{"text": "x"}\n')
    for change, said in (
        ({"--out": "es.txt"}, "jsonl"),
        ({"--limit": "0"}, "--limit 0"),
        ({"--source": str(tmp_path / "nowhere")}, "does not exist"),
        ({}, "cannot be loaded as a translation model"),
    ):
        with pytest.raises(DataError, match=said):
            main([part for pair in {**good, **change}.items() for part in pair])
    assert not (tmp_path / "es.jsonl").exists()
    with pytest.raises(DataError, match="has no text"):
        list(translate_rows([{"title": "x"}], lambda pieces: pieces))
