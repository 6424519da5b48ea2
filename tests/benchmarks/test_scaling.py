"""The scaling section, tiny: every table has lines, and they land between the markers of the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import computed, growth, scaling
from gradsurgery.errors import DataError

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "Size", lambda pairs: growth.TINY)
    monkeypatch.setattr(scaling.measure, "__defaults__", ("", ("1m",)))


def test_the_page_is_written_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "scaling.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    options = ["--sections", "scaling", "--device", "cpu", "--page", str(page), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options])
    command.main()
    text, found = page.read_text(encoding="utf-8"), json.loads((tmp_path / "benchmarks.json").read_text())["scaling"]
    for part, functions in (("measured", growth.SECTIONS), ("computed", computed.SECTIONS)):
        between = text[text.index(scaling.START.format(part)) : text.index(scaling.END.format(part))]
        for title in functions:
            assert f"### {title}\n" in between
            assert found[part][title]
            assert (tmp_path / "benchmarks.md").read_text(encoding="utf-8").count(f"### {title}\n") == 1
    held = PAGE.read_text(encoding="utf-8")
    assert text[: text.index("<!--")] == held[: held.index("<!--")]


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Scaling\n", encoding="utf-8")
    with pytest.raises(DataError, match="to write between"):
        scaling.write(page, {"measured": "text"})
    assert page.read_text(encoding="utf-8") == "# Scaling\n"


def test_the_page_shows_what_is_computed() -> None:
    """Computed figures need no quiet machine: those of the page are those of the formulas of today (8B alone)."""
    text = PAGE.read_text(encoding="utf-8")
    for title, lines in computed.compute(("8b",)).items():
        for line in lines:
            shown = [row for row in text.splitlines() if row.startswith("| 8b ")]
            cells = [f"{value:,}" if isinstance(value, int) else f"{value:.3f}" for value in list(line.values())[2:]]
            plain = [c for c, v in zip(cells, list(line.values())[2:], strict=True) if isinstance(v, int) or v >= 1e-3]
            assert any(all(cell in row for cell in plain) for row in shown), (title, line)


def test_swaps_of_the_same_bytes() -> None:
    sizes = {line["MB"] for line in growth.swaps(growth.TINY, "cpu")}
    assert len(sizes) == 1


def test_options_name_every_section() -> None:
    assert set(command.SECTIONS) == set(command.MEASURES)
