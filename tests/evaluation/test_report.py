import base64
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from gradsurgery.evaluation import report, training_curves, write_report

CONFIG = {"steps": 1200, "model": {"layers": 4, "name": "<tiny>"}, "empty": {}}


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_whole_and_self_contained(tmp_path):
    figure = training_curves({"a": {"en": [(0, 7.6), (10, 5.0)]}})
    path = write_report(
        tmp_path / "new" / "report.html",
        title="SGTM & more",
        config=CONFIG,
        results=[{"run": "sgtm", "loss": 1.23456}],
        figures={"Curves of <a>": figure},
        notes=["One seed."],
    )
    text = path.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "<h1>SGTM &amp; more</h1>" in text and "<p>One seed.</p>" in text
    assert "<td>model.name</td><td>&lt;tiny&gt;</td>" in text
    assert '<td class="number">1.235</td>' in text
    assert "Curves of &lt;a&gt;</figcaption>" in text
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import|<script", text)
    (image,) = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert base64.b64decode(image).startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_several_tables(tmp_path):
    path = write_report(tmp_path / "r.html", title="t", config={}, results={"One": [{"a": 1}], "Two": [{"b": 2}]})
    text = path.read_text()
    assert text.index("<h2>One</h2>") < text.index("<h2>Two</h2>")


def test_a_failure_leaves_the_old_report(tmp_path, monkeypatch):
    path = write_report(tmp_path / "r.html", title="old", config={}, results=[])

    def fail(figure):
        raise RuntimeError("no ink")

    monkeypatch.setattr(report, "_data_uri", fail)
    with pytest.raises(RuntimeError):
        write_report(path, title="new", config={}, results=[], figures={"f": Figure()})
    assert "old" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
