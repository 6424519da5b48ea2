from gradsurgery.evaluation import table

ROWS: list[dict[str, object]] = [
    {"run": "sgtm", "en": 4.4567, "n": 1200},
    {"run": "a|b", "en": None, "n": 3, "ok": True},
]


def test_text():
    assert table(ROWS).splitlines() == [
        "run      en      n  ok",
        "----  -----  -----  ----",
        "sgtm  4.457  1,200  –",
        "a|b       –      3  True",
    ]


def test_markdown():
    assert table(ROWS, "markdown", digits=1).splitlines() == [
        "| run  |  en |     n | ok   |",
        "|------|----:|------:|------|",
        "| sgtm | 4.5 | 1,200 | –    |",
        "| a\\|b |   – |     3 | True |",
    ]


def test_html_is_escaped():
    text = table([{"<b>": "1 < 2", "x": 1.5}], "html")
    assert '<th>&lt;b&gt;</th><th class="number">x</th>' in text
    assert '<td>1 &lt; 2</td><td class="number">1.500</td>' in text


def test_small_large_and_no_numbers():
    values = [1e-9, 2.5e12, 0.0, float("inf"), float("nan")]
    assert [line.strip() for line in table([{"x": v} for v in values]).splitlines()[2:]] == [
        "1.000e-09", "2.500e+12", "0.000", "inf", "nan",
    ]  # fmt: skip
    assert table([]) == ""
