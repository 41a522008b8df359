"""The file that grows by finished rows: what a kill leaves, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rgtg_fast import RGTGError
from rgtg_fast.evaluation.journal import Journal


def test_rows_are_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    with Journal(path, ("a",)) as journal:
        journal.add({"a": 1, "b": math.nan, "c": (1, 2)})
        assert path.read_text() == '{"a": 1, "b": null, "c": [1, 2]}\n'
    with Journal(path, ("a",)) as journal:
        assert journal.rows == [{"a": 1, "b": None, "c": [1, 2]}]
        assert not journal.truncated


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_unfinished_last_line_is_cut_off_wherever_it_ends(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    lines = ['{"a": 1}\n', '{"a": "é"}\n']
    content = "".join(lines).encode()
    path.write_bytes(content[:-cut])
    with Journal(path, ("a",)) as journal:
        assert journal.truncated == (cut < len(lines[1].encode()))
        journal.add({"a": 3})
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize("line", ["nonsense", "[1]", "3", '{"b": 1}'])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(RGTGError, match=r"rows\.jsonl:2 "):
        Journal(path, ("a",))
    assert path.read_text().count("\n") == 3


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    with Journal(tmp_path / "rows.jsonl", ()), pytest.raises(RGTGError, match="being written by another"):
        Journal(tmp_path / "rows.jsonl", ())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RGTGError, match="cannot write"):
        Journal(tmp_path / "file" / "rows.jsonl", ())
