"""How a report is written: texts are nothing but text in Markdown and HTML, figures show what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rgtg_fast.evaluation.study import plots
from rgtg_fast.evaluation.study.page import Drawing, Notes, Section, SideBySide, Table, Text, html, markdown
from rgtg_fast.evaluation.study.ratings import Agreement
from rgtg_fast.evaluation.study.summary import COLUMNS, gaps

HOSTILE = "a|b <script>x</script> *c* [d](e) `f`\n# g"


def point(method: str, beta: float | None, **values: Any) -> dict[str, Any]:
    row = dict.fromkeys(COLUMNS) | {"method": method, "beta": beta, "reward": 0.5, "reward_se": 0.1}
    return row | {"kl": 2.0, "tokens_per_second": 30.0} | values


def test_texts_are_nothing_but_text() -> None:
    parts = (
        Text(HOSTILE),
        Notes((HOSTILE,), urgent=True),
        Table(("head", HOSTILE), ((HOSTILE, "1"),)),
        SideBySide(HOSTILE, ((HOSTILE, HOSTILE, HOSTILE),)),
    )
    page = html("T", [Section("S", parts)])
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 8
    lines = markdown("T", [Section("S", parts)], "figures").splitlines()
    assert lines[:3] == ["# T", "", "## S"]
    for line in lines[3:]:
        assert "<script>" not in line.replace("\\<", "")
        assert not line.startswith("# ")
    (row,) = (line for line in lines if line.startswith("| a"))
    assert row.replace("\\|", "").count("|") == 3


def test_a_drawing_is_inside_the_page_and_beside_the_markdown() -> None:
    sections = [Section("", (Drawing("name", "What it shows", "<svg/>"),))]
    assert "data:image/svg+xml;base64,PHN2Zy8+" in html("T", sections)
    assert "![What it shows](pictures/name.svg)" in markdown("", sections, "pictures")


def test_figures_of_what_is_known() -> None:
    rows = [
        point("unguided", None),
        point("pargs", 1.0),
        point("pargs", 2.0, reward=0.7),
        point("b", None, kl=None),
    ]
    beta = plots.reward_over_beta(rows, "unguided")
    assert beta is not None
    assert "pargs" in beta
    assert "unguided (baseline)" in beta
    assert ">b<" not in beta
    kl = plots.reward_over_kl(rows, "unguided")
    assert kl is not None
    assert ">b<" not in kl
    speed = plots.reward_over_speed(rows, "unguided")
    assert speed is not None
    assert ">b<" in speed
    assert speed == plots.reward_over_speed(rows, "unguided")


def test_no_figure_without_numbers() -> None:
    rows = [
        point("unguided", None, kl=None, tokens_per_second=None),
        point("x", 1.0, kl=None, tokens_per_second=None),
    ]
    assert plots.reward_over_beta(rows, "unguided") is None
    assert plots.reward_over_kl(rows, "unguided") is None
    assert plots.reward_over_speed(rows, "unguided") is None
    assert plots.accuracy_over_length([], "") is None


def test_a_method_looks_the_same_in_every_figure_and_like_no_other() -> None:
    looks = plots._looks([point(f"m{n}", None) for n in range(20)])
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 20


def test_accuracy_has_its_curves_and_its_baseline() -> None:
    accuracy = [{"fraction": f, "accuracy": 0.6, "ci95": [0.5, 0.7], "n": 9} for f in (0.5, 1.0)]
    found = plots.accuracy_over_length([Agreement("one", "one", True, accuracy, accuracy[1], [])], "title")
    assert found is not None
    assert "longer answer wins" in found
    assert "one" in found


def test_empty_columns_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [point("unguided", None), point("best", None, kl=None)]
    with monkeypatch.context() as installed:
        installed.setattr("rgtg_fast.evaluation.study.metrics.rouge_l", lambda: object())
        assert any("rouge_l is empty: no method has several samples" in line for line in gaps(rows))
    assert any(line.startswith("kl is empty for best: only token-by-token") for line in gaps(rows))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = gaps([point("unguided", None, rouge_l=None)])
    assert [line.split(":")[0] for line in told] == ["rouge_l is empty", "coherence is empty"]
    assert all('pip install "rgtg-fast[evaluate]"' in line for line in told)


def test_names_in_figures_are_neither_mathematics_nor_left_out() -> None:
    from xml.etree import ElementTree

    from rgtg_fast.evaluation.accuracy import FractionAccuracy, drawn
    from rgtg_fast.evaluation.study.plots import _as_svg

    names = ["$\\frac{1}{$", "$x$ and $y$", "_hidden", "a\x1b[31m\nb", "</text><script>"]
    curve = [FractionAccuracy(f, 0.5, (0.4, 0.6), 100) for f in (0.5, 1.0)]
    svg = _as_svg(drawn(dict.fromkeys(names, curve), title="$\\nonsense$"))
    shown = "\n".join(ElementTree.fromstring(svg).itertext())
    for text in ("$\\frac{1}{$", "$x$ and $y$", "_hidden", "a\\x1b[31m b", "</text><script>", "$\\nonsense$"):
        assert text in shown


def test_texts_of_models_in_a_page_are_texts() -> None:
    from rgtg_fast.evaluation.study import page
    from rgtg_fast.evaluation.study.page import Section, SideBySide, Table

    nasty = "</script><b>x</b> | $a$ ~b~ &lt; \u202e\x1b"
    parts = (Table(("method",), ((nasty,),)), SideBySide(nasty, ((nasty, nasty, nasty),)))
    text = page.html(nasty, [Section(nasty, parts)])
    assert "<b>" not in text
    assert "&amp;lt;" in text
    for written in (text, page.markdown("", [Section("", parts)], "figures")):
        assert "\u202e" not in written
        assert "\x1b" not in written
    assert "\\| \\$a\\$ \\~b\\~ \\&lt; \\\\u202e\\\\x1b |" in page.markdown(
        "", [Section("", parts[:1])], "figures"
    )


def test_names_in_tables_are_no_formulas(tmp_path: Path) -> None:
    from rgtg_fast.evaluation.study.summary import _write

    rows = [
        {"method": "=1+1", "reward": -1.5},
        {"method": "@x", "reward": None},
        {"method": "a=b", "reward": 2},
    ]
    _write(rows, ["method", "reward"], tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "method,reward\n'=1+1,-1.5\n'@x,\na=b,2\n"
