"""The file that grows by finished rows: what a kill leaves, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rgtg_fast import RGTGError
from rgtg_fast.evaluation.jsonl import JsonlWriter


def test_rows_are_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    with JsonlWriter(path, ("a",)) as writer:
        writer.add({"a": 1, "b": math.nan, "c": (1, 2)})
        assert path.read_text() == '{"a": 1, "b": null, "c": [1, 2]}\n'
    with JsonlWriter(path, ("a",)) as writer:
        assert writer.rows == [{"a": 1, "b": None, "c": [1, 2]}]
        assert not writer.truncated


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_unfinished_last_line_is_cut_off_wherever_it_ends(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    lines = ['{"a": 1}\n', '{"a": "é"}\n']
    content = "".join(lines).encode()
    path.write_bytes(content[:-cut])
    with JsonlWriter(path, ("a",)) as writer:
        assert writer.truncated == (cut < len(lines[1].encode()))
        writer.add({"a": 3})
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize("line", ["nonsense", "[1]", "3", '{"b": 1}'])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(RGTGError, match=r"rows\.jsonl:2 "):
        JsonlWriter(path, ("a",))
    assert path.read_text().count("\n") == 3


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "rows.jsonl", ()), pytest.raises(RGTGError, match="being written by another"):
        JsonlWriter(tmp_path / "rows.jsonl", ())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RGTGError, match="cannot write"):
        JsonlWriter(tmp_path / "file" / "rows.jsonl", ())


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "rows.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with JsonlWriter(path, ("a",)) as writer:
        writer.add({"a": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.raises(RGTGError, match=r"File too large; its 1 finished rows are safe, run again"):
                writer.add({"a": "x" * 200})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_text() == '{"a": 1}\n'
        writer.add({"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_goes_under_a_run_is_noticed_and_its_rows_are_saved(
    tmp_path: Path, replaced: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    writer = JsonlWriter(path, ("a",))
    writer.add({"a": 1})
    path.unlink()
    if replaced:
        path.write_text("another\n")
    with pytest.raises(
        RGTGError, match="was deleted or replaced while this run was writing it; its rows are in"
    ):
        writer.add({"a": 2})
    with pytest.raises(RGTGError, match="was deleted or replaced"):
        writer.finish()
    writer.close()
    saved = sorted(tmp_path.glob("rows.jsonl.*.rescued"))
    assert [file.read_text() for file in saved] == ['{"a": 1}\n'] * 2
    assert path.exists() == replaced


def test_rows_are_dropped_only_when_there_is_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    for error in (RGTGError, KeyboardInterrupt):
        with pytest.raises(error), JsonlWriter(path, ("a",), anew=True):
            raise error
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
    with JsonlWriter(path, ("a",), anew=True) as writer:
        writer.add({"a": 3})
        assert path.read_text() == '{"a": 3}\n'
    with JsonlWriter(path, ("a",), anew=True):
        pass
    assert path.read_text() == ""


def test_a_run_that_fails_at_once_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(RGTGError, match="no model"), JsonlWriter(path, ("a",)):
        raise RGTGError("no model")
    assert not path.exists()


def test_any_text_comes_back_and_stands_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = "a\u2028b\x85c\x9bd\u202ee\ud83df\x1bg\nh"
    with JsonlWriter(path, ("a",)) as writer:
        writer.add({"a": text})
    assert len(path.read_text().splitlines()) == 1
    with JsonlWriter(path, ("a",)) as writer:
        assert writer.rows == [{"a": text}]


def test_a_last_line_that_is_none_of_ours_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "diary.txt"
    path.write_text("dear diary")
    with pytest.raises(RGTGError, match=r"diary\.txt:1 is not a row"):
        JsonlWriter(path, ("a",))
    assert path.read_text() == "dear diary"
