"""Files in which nothing is lost: complete or as they were, and with one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rgtg_fast.errors import RGTGError

# Bytes of a file's name that are kept where something is put before or behind it.
_NAME_BYTES = 200


def reason(error: BaseException) -> str:
    """Why a file could not be used, in one line."""
    told = error.strerror if isinstance(error, OSError) else None
    return told or " ".join(str(error).split())[:160] or type(error).__name__


def check_writable(path: Path, *inputs: Path | str | None) -> None:
    """Refuses a place for a new file before work begins whose result could not be written there.

    Args:
        path: of the file; one that exists is to be replaced.
        inputs: files that are read, which it must not be, under whatever name.

    Raises:
        RGTGError: no such folder, no right to write, a folder of that name, or one of the inputs.
    """
    try:
        folder, exists = path.parent, os.path.lexists(path)
        if path.is_dir():
            raise RGTGError(f"cannot write {path}: it is a folder, name a file")
        if not folder.is_dir():
            raise RGTGError(f"cannot write {path}: the folder {folder} does not exist")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise RGTGError(f"cannot write {path}: no permission, name another place")
        if not exists:
            # The name may be too long, or hold what the file system does not take.
            path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        if isinstance(error, RGTGError):
            raise
        raise RGTGError(f"cannot write {path}: {reason(error)}") from error
    for source in inputs:
        if source is not None and same_file(path, Path(source)):
            raise RGTGError(f"{path} is the file that is read ({source}): name another place to write to")


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file: by links, by another spelling, or on a file system without case."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends without an error.

    Whatever goes wrong, `path` keeps what it had, and the half-written file is removed. What is no regular file (a
    device, a pipe) is written to directly.

    Raises:
        RGTGError: the file cannot be written.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            yield target
            return
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(13, "Permission denied")
        partial = target.with_name(f".{_short(target.name)}.partial")
        try:
            yield partial
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, RGTGError):
            raise
        raise RGTGError(f"cannot write {path}: {reason(error)}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8, complete or not at all; lone surrogates become question marks.

    Raises:
        RGTGError: the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_bytes(text.encode("utf-8", "replace"))


def _short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_NAME_BYTES])


def hold(file: IO[bytes], path: Path, instead: str, wait: bool = False) -> None:
    """Holds an open file against a second writer; the lock ends with the process, however it ends.

    Args:
        path: of the file. instead: what the second writer is told to do.
        wait: until the other one is done, in place of an error.

    Raises:
        RGTGError: another process holds it.
    """
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise RGTGError(f"{path} is being written by another process: wait for it or {instead}") from error
    except OSError as error:
        # Some network file systems know no locks.
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise


@contextlib.contextmanager
def only_writer(folder: Path, name: str, instead: str = "", wait: bool = False) -> Iterator[None]:
    """Holds a folder against a second writer, by a file in it that is removed afterwards.

    What a killed process leaves of it holds nobody up.

    Args:
        folder: made where it is missing.
        name: of the lock's file.
        instead, wait: as in `hold`.

    Raises:
        RGTGError: another process writes there.
        OSError: nobody can.
    """
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        lock = path.open("ab")
        try:
            hold(lock, folder, instead, wait)
        except BaseException:
            lock.close()
            raise
        # The one before may have removed the file that this one waited for.
        if sys.platform == "win32" or still_at(path, lock):
            break
        lock.close()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if still_at(path, lock):
                path.unlink()
        lock.close()


def still_at(path: Path, file: IO[bytes]) -> bool:
    """Whether an open file is what its path leads to, neither deleted nor replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def publish(partial: Path, final: Path) -> None:
    """Gives a complete folder its name, in place of what has it; a power cut leaves no file of it half-written.

    Raises:
        OSError: the disk.
    """
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
