"""Reads rows of data: from files, folders and data sets of Hugging Face, tables in memory, and plain lists."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rgtg_fast.errors import RGTGError

FILES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".ndjson")
# Methods of tables in memory that return a list of rows: pyarrow's, polars'.
_TABLES = ("to_pylist", "to_dicts")
# Keys of a JSON object under which its rows may be, besides the split's name.
_ROWS = ("data", "rows", "examples")


def read_rows(source: Any, split: str = "train") -> Iterator[Any]:
    """The source's rows, as `load_pairs` takes them; a row that cannot be parsed is a text that says why.

    Args:
        source: as in `load_pairs`.
        split: split of a data set with several.

    Raises:
        RGTGError: the source cannot be read, or has no rows.
    """
    if isinstance(source, (str, os.PathLike)):
        if not os.fspath(source):
            raise RGTGError("the data's name is empty: name a file, or a data set of Hugging Face")
        path = Path(source)
        suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
        if suffix in FILES and not path.is_dir():
            return _from_file(path, suffix, split)
        if path.is_file():
            raise RGTGError(f"{path} is in no known format: use {', '.join(FILES)}, or .gz of them")
        return _from_datasets(str(source), split)
    if isinstance(source, Mapping):
        return iter(_from_mapping(source))
    # pandas: its iterator yields the names of the columns.
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        return iter(source.to_dict("records"))
    for name in _TABLES:
        if hasattr(source, name):
            return iter(getattr(source, name)())
    try:
        return iter(source)
    except TypeError:
        raise RGTGError(
            f"{type(source).__name__} is not a source of rows: pass a file, a folder, a data set or a list of rows"
        ) from None


def _from_mapping(source: Mapping[Any, Any]) -> list[dict[Any, Any]]:
    """The rows of a table of columns; refuses a dictionary of splits."""
    columns = list(source.values())
    table = bool(columns) and all(isinstance(column, (list, tuple)) for column in columns)
    if not table or len({len(column) for column in columns}) > 1 or _are_rows(columns[0]):
        raise RGTGError(f"the data set has the splits {', '.join(map(repr, source))}: pass one of them")
    return [dict(zip(source, row, strict=True)) for row in zip(*columns, strict=True)]


def _are_rows(values: Any) -> bool:
    """Whether a list contains whole rows, not one column's messages or texts."""
    return bool(values) and all(
        isinstance(value, Mapping) and not {"role", "from"} & set(value) for value in values
    )


def _from_file(path: Path, suffix: str, split: str) -> Iterator[Any]:
    try:
        if suffix in (".parquet", ".arrow"):
            return iter(_from_arrow(path, suffix))
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RGTGError(f"cannot read {path}: {reason}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RGTGError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error
    if suffix == ".csv":
        return _from_csv(text, path)
    if suffix == ".json":
        return _from_json_file(text, path, split)
    return (_from_json(line) for line in text.split("\n") if line.strip())


def _from_json_file(text: str, path: Path, split: str) -> Iterator[Any]:
    """Rows of a JSON list, of a table as pandas writes it, of a list under a key, or of JSON Lines."""
    begin = text.lstrip()[:1]
    try:
        found = json.loads(text) if begin in ("[", "{") else None
    except (ValueError, RecursionError) as error:
        if begin == "[":
            raise RGTGError(f"{path} is not JSON: {' '.join(str(error).split())}") from error
        found = None
    if isinstance(found, list):
        return iter(found)
    if found is None:
        return (_from_json(line) for line in text.split("\n") if line.strip())
    values = list(found.values())
    if values and all(isinstance(value, dict) and all(key.isdigit() for key in value) for value in values):
        columns = [list(value.values()) for value in values]
        return iter([dict(zip(found, row, strict=False)) for row in zip(*columns, strict=False)])
    inside = next((found[name] for name in (split, *_ROWS) if isinstance(found.get(name), list)), None)
    return iter([found] if inside is None else inside)


def _from_json(line: str) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(":")[0]
        return f"not JSON ({'nested too deeply' if isinstance(error, RecursionError) else detail})"
    return row if not isinstance(row, str) else "a row is an object with fields, not a text"


def _from_csv(text: str, path: Path) -> Iterator[Any]:
    # The csv module refuses fields over 128 KiB unless told otherwise.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names = list(reader.fieldnames or [])
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise RGTGError(f"{path} has two columns {doubled!r}: give each a name of its own")
        for row in reader:
            # Cells beyond the last column: a comma without quotes has split a cell.
            more = row.pop(None, None)  # pyright: ignore[reportArgumentType, reportCallIssue]
            yield (
                row
                if more is None
                else f"{len(names) + len(more)} cells and {len(names)} columns: quote cells"
            )
    except csv.Error as error:
        raise RGTGError(f"{path} is not CSV: {error}") from error


def _from_arrow(path: Path, suffix: str) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise RGTGError(f'{suffix} files need pyarrow: pip install "rgtg-fast[train]"') from error
    kind = "Parquet" if suffix == ".parquet" else "Arrow"
    try:
        if suffix == ".parquet":
            return parquet.read_table(path).to_pylist()
        with pyarrow.OSFile(str(path)) as file:
            # `datasets` writes Arrow streams, other programs write Arrow files.
            opened = ipc.open_file if file.read(6) == b"ARROW1" else ipc.open_stream
            file.seek(0)
            return opened(file).read_all().to_pylist()
    except pyarrow.ArrowException as error:
        raise RGTGError(f"{path} is not {kind}: {' '.join(str(error).split())[:120]}") from error


def _from_datasets(name: str, split: str) -> Iterator[Any]:
    path = Path(name)
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or path.suffix):
        raise RGTGError(f"the data {name!r} does not exist: check the path")
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise RGTGError(
            f'{name!r} is not a file, and data sets need: pip install "rgtg-fast[train]"'
        ) from error
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded: Any = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        why = " ".join(str(error).split())[:160]
        raise RGTGError(f"no data set {name!r} with a split {split!r} can be loaded: {why}") from error
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise RGTGError(f"the data set {name!r} has the splits {', '.join(loaded)}, not {split!r}")
        loaded = loaded[split]
    return iter(loaded)
