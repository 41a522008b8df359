"""Files are written completely or not at all, and folders have one writer."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rgtg_fast import RGTGError
from rgtg_fast.files import check_writable, only_writer, replacing, write_text
from rgtg_fast.plaintext import printable

linux = pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")


def _fill_the_disk(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")


def test_a_file_is_unchanged_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(RGTGError, match=r"cannot write .*page\.html: No space left"):
        _fill_the_disk(path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    write_text(path, "after \ud83d")
    assert path.read_text() == "after ?"


def test_the_target_of_a_link_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    target.chmod(0o640)
    link.symlink_to(target)
    write_text(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert target.stat().st_mode & 0o777 == 0o640


def test_output_paths_are_checked(tmp_path: Path) -> None:
    source, link, hard = tmp_path / "source", tmp_path / "link", tmp_path / "hard"
    source.write_text("x")
    link.symlink_to(source)
    hard.hardlink_to(source)
    for path, words in (
        (tmp_path, "it is a folder"),
        (tmp_path / "none" / "file", "does not exist"),
        (tmp_path / ("a" * 300), "File name too long"),
        (tmp_path / ("a" * 300) / "file", "File name too long|does not exist"),
        (tmp_path / "a\0b", "null"),
        (link, "is the file that is read"),
        (hard, "is the file that is read"),
        (tmp_path / "none" / ".." / "source", "does not exist|is the file"),
    ):
        with pytest.raises(RGTGError, match=words):
            check_writable(path, source, None)
    check_writable(tmp_path / "new", source)
    assert not (tmp_path / "new").exists()


@linux
def test_a_folder_has_one_writer_and_its_lock_file_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with (
        only_writer(folder, ".lock", "name another folder"),
        pytest.raises(
            RGTGError, match="being written by another process: wait for it or name another folder"
        ),
        only_writer(folder, ".lock", "name another folder"),
    ):
        pass
    assert list(folder.iterdir()) == []


@linux
def test_the_lock_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from rgtg_fast.files import only_writer
        with only_writer(Path(sys.argv[1]), ".lock"):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".lock").exists()
    with only_writer(tmp_path, ".lock"):
        pass
    assert not os.listdir(tmp_path)  # noqa: PTH208


def test_control_characters_are_replaced_by_their_codes() -> None:
    text = "a\tb\nc é 😀 \x1b]0;t\x07 \x9b31m \x7f \r \u202e \u2066 \ud83d"
    shown = "a\tb\nc é 😀 \\x1b]0;t\\x07 \\x9b31m \\x7f \\r \\u202e \\u2066 \\ud83d"
    assert printable(text) == shown
