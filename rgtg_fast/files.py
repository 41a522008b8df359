"""Writes files completely or not at all, checks output paths, and locks files against a second writer."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rgtg_fast.errors import RGTGError, one_line

# Longest part of a file's name in the name of its temporary file; file systems allow 255 bytes.
_NAME_BYTES = 200


def reason(error: BaseException) -> str:
    """Why a file could not be used, in one line."""
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def check_writable(path: Path, *inputs: Path | str | None) -> None:
    """Checks that a file can be written, before the work whose result it will hold.

    Args:
        path: path of the file, which may exist and will be replaced.
        inputs: paths of files that are read; `path` must not lead to one of them.

    Raises:
        RGTGError: no such folder, no permission, a folder of that name, or one of the inputs.
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
            # Fails where the file system does not allow the name.
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
    """Whether two paths lead to one file: links, another spelling, or a case-insensitive file system."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replaces a file atomically: gives a temporary path to write to, and renames it when the block succeeds.

    After an error `path` is unchanged and the temporary file is removed. A device or a pipe is written to directly.

    Args:
        path: path of the file; a link's target is replaced.

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
        partial = target.with_name(f".{os.fsdecode(os.fsencode(target.name)[:_NAME_BYTES])}.partial")
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
    """Writes a text as UTF-8, completely or not at all; lone surrogates become question marks.

    Raises:
        RGTGError: the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_bytes(text.encode("utf-8", "replace"))


def hold(file: IO[bytes], path: Path, instead: str, wait: bool = False) -> None:
    """Locks an open file; the operating system releases the lock when the process ends.

    Args:
        file: the open file.
        path: its path, for the message.
        instead: what else the second writer can do, for the message: "wait for it or ...".
        wait: whether to wait for another writer instead of raising an error.

    Raises:
        RGTGError: another process has locked the file.
    """
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise RGTGError(f"{path} is being written by another process: wait for it or {instead}") from error
    except OSError as error:
        # Some network file systems have no locks.
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise


@contextlib.contextmanager
def only_writer(folder: Path, name: str, instead: str = "", wait: bool = False) -> Iterator[None]:
    """Locks a folder against a second writer, with a lock file in it that is removed afterwards.

    A lock file that a killed process has left does not block.

    Args:
        folder: created if it is missing.
        name: name of the lock file.
        instead: as in `hold`.
        wait: as in `hold`.

    Raises:
        RGTGError: another process writes there.
        OSError: the lock file cannot be written.
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
        # The previous writer may have removed the file while this one waited for it.
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
    """Whether an open file is still the one at its path, neither deleted nor replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def publish(partial: Path, final: Path) -> None:
    """Renames a complete folder, replacing an older one; its files are flushed to disk first.

    Args:
        partial: the folder with all its files.
        final: its new path.

    Raises:
        OSError: the file system refuses.
    """
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
