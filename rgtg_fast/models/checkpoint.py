"""Reads the files of a model's folder before transformers loads them, and refuses those that it would misread.

Messages begin with "it holds" or "its FILE": a caller adds the model's role and name (`error_prefix`).
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file

from rgtg_fast.errors import RGTGError, one_line
from rgtg_fast.files import reason

CONFIG = "config.json"
# The names under which transformers looks for weights, in its order.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_OTHER_WEIGHTS = {
    "*.gguf": "GGUF weights",
    "*.onnx": "ONNX weights",
    "tf_model.h5": "TensorFlow weights",
    "flax_model.msgpack": "Flax weights",
    "consolidated*": "weights in Meta's or Mistral's format",
    "*.ckpt": "a Lightning checkpoint",
    "model-*-of-*.safetensors": "shards without their model.safetensors.index.json",
    "pytorch_model-*-of-*.bin": "shards without their pytorch_model.bin.index.json",
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "tokenizer.model",
)
_LFS_POINTER = b"version https://git-lfs"
# Prefixes of safetensors dtypes that hold weights only together with a quantization_config.
_QUANTIZED_DTYPES = ("I", "U", "F8", "F4", "BOOL")
_SAVE = "save it with save_pretrained(folder)"
_AGAIN = "download or save it again"
# What reading a damaged file raises.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)


@contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Puts a prefix, such as a model's role and name, before the messages of this module's errors."""
    try:
        yield
    except RGTGError as error:
        raise RGTGError(f"{prefix}: {error}") from error


def check_model(folder: Path) -> int | None:
    """Checks a model's folder before it is loaded.

    Args:
        folder: an existing path.

    Returns:
        The number of parameters in the weight files; None where they are pickled or quantized.

    Raises:
        RGTGError: a file instead of a folder, no configuration, no weights, or files that cannot be read.
    """
    if folder.is_file():
        raise RGTGError(f"it is a file: name the folder that holds it, with its {CONFIG}, or a GGUF file")
    if not (folder / CONFIG).is_file():
        raise RGTGError(f"it contains no {CONFIG}{_instead_of_config(folder)}")
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise RGTGError(f"its {CONFIG} names no model_type: {_SAVE} from transformers")
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    files = _weight_files(folder, config)
    if any(file.suffix != ".safetensors" for file in files):
        for file in files:
            # torch's format is a zip archive, whose table of contents comes last.
            if _first_bytes(file).startswith(b"PK") and not zipfile.is_zipfile(file):
                raise RGTGError(f"its {file.name} was cut off: {_AGAIN}")
        return None
    entries: dict[str, dict[str, Any]] = {}
    for file in files:
        header = safetensors_header(file)
        if not config.get("quantization_config"):
            _check_dtypes(file, header)
        entries |= header
    if config.get("quantization_config"):
        return None
    return sum(math.prod(entry["shape"]) for entry in entries.values())


def check_file(path: Path) -> None:
    """Checks that a file of weights is readable, not empty and not a Git LFS pointer.

    Raises:
        RGTGError: it is not.
    """
    _first_bytes(path)


def check_tokenizer(folder: Path) -> None:
    """Checks a tokenizer's files before they are loaded.

    Raises:
        RGTGError: none there, or one that cannot be read.
    """
    present = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer.json", "*vocab*", "*.model")):
        raise RGTGError(
            "it contains no tokenizer (tokenizer.json): save it there with tokenizer.save_pretrained(folder), or pass "
            "a (model, tokenizer) pair"
        )
    for path in [*present, *folder.glob("*.jinja")]:
        if path.suffix == ".json":
            read_json(path)
        else:
            _first_bytes(path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        RGTGError: a Git LFS pointer, invalid JSON, or JSON that is not an object.
    """
    _first_bytes(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RGTGError(
            f"its {path.name} is not readable JSON ({one_line(error, 80)}): {_SAVE} again"
        ) from error
    if not isinstance(found, dict):
        raise RGTGError(f"its {path.name} is not a JSON object: {_SAVE} again")
    return found


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Reads dtype, shape and offsets of every tensor of a safetensors file, by the tensor's name.

    Raises:
        RGTGError: a Git LFS pointer, a truncated file, or no safetensors file.
    """
    length = int.from_bytes(_first_bytes(path)[:8], "little")
    size = path.stat().st_size
    if size < 8 or length > size - 8:
        raise RGTGError(f"its {path.name} is not a safetensors file, or was cut off ({size} bytes): {_AGAIN}")
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        for entry in header.values():
            if min(entry["shape"], default=0) < 0 or not isinstance(entry["dtype"], str):
                raise ValueError(f"shape {entry['shape']}")
    except _UNREADABLE as error:
        raise RGTGError(
            f"its {path.name} has a header that cannot be read ({one_line(error, 80)}): {_AGAIN}"
        ) from error
    if end != size - 8 - length:
        raise RGTGError(
            f"its {path.name} holds {size - 8 - length} bytes of weights where its header counts {end}: it was cut "
            f"off; {_AGAIN}"
        )
    return header


def weight_shapes(source: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the weights in a model's files, by name, without reading the weights.

    Args:
        source: folder or hub id, whose files are downloaded where they are not in the cache.

    Returns:
        None where the files cannot be read, which loading them reports.
    """
    try:
        folder = Path(source)
        if folder.is_dir():
            files = _weight_files(folder, read_json(folder / CONFIG))
        else:
            files = [] if folder.exists() else _hub_weight_files(str(source))
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            if file.suffix == ".safetensors":
                shapes |= {key: tuple(entry["shape"]) for key, entry in safetensors_header(file).items()}
            else:
                tensors = torch.load(file, map_location="meta", weights_only=True, mmap=True)
                # Loading reports what is no tensor.
                shapes |= {key: tuple(x.shape) for key, x in tensors.items() if isinstance(x, torch.Tensor)}
        return shapes or None
    except Exception:  # noqa: BLE001 - the hub and damaged files raise anything
        return None


def _hub_weight_files(name: str) -> list[Path]:
    """The weight files of a model on the hub, in the cache."""
    for candidate in _WEIGHTS:
        found = cached_file(name, candidate, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        if not candidate.endswith(".json"):
            return [Path(found)]
        shards = sorted(set(read_json(Path(found))["weight_map"].values()))
        return [Path(str(cached_file(name, shard))) for shard in shards]
    return []


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a safetensors file.

    Raises:
        RGTGError: a file that cannot be read.
    """
    safetensors_header(path)
    try:
        return load_file(path)
    except (*_UNREADABLE, RuntimeError, SafetensorError) as error:
        raise RGTGError(one_line(error, 200)) from error


def names(keys: Iterable[str], limit: int = 2) -> str:
    """The first names of weights, quoted since a file may contain any, and how many more there are."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(repr(key[:120]) for key in ordered[:limit]) + more


def _first_bytes(path: Path) -> bytes:
    """The beginning of a file that is not empty and not a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise RGTGError(f"its {path.name} cannot be read ({reason(error)}): check its permissions") from error
    if start.startswith(_LFS_POINTER):
        raise RGTGError(
            f"its {path.name} is a Git LFS pointer, not the file: run `git lfs pull` in the folder"
        )
    if not start:
        raise RGTGError(f"its {path.name} is empty: {_AGAIN}")
    return start


def _instead_of_config(folder: Path) -> str:
    """What a folder without a configuration holds instead, and what to do."""
    if (folder / "adapter_config.json").is_file():
        return " but adapter_config.json: it is an adapter; name it alone as reward or lm, or merge it into its base"
    configs = sorted(folder.glob("*/" + CONFIG)) + sorted(folder.glob("snapshots/*/" + CONFIG))
    if configs:
        return f": name the folder inside it, such as {str(configs[-1].parent.relative_to(folder))!r}"
    other = _other_weights(folder)
    if other is not None:
        return f" but {other}: name the folder that transformers' save_pretrained wrote"
    if not any(folder.iterdir()):
        return " (it is empty): name a folder that a model was saved to"
    return ": name a folder that a model was saved to"


def _other_weights(folder: Path) -> str | None:
    """The first kind of weights in a folder that transformers does not look for, None for none."""
    return next((what for pattern, what in _OTHER_WEIGHTS.items() if any(folder.glob(pattern))), None)


def _weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    named = config.get("transformers_weights")
    candidates = (named,) if isinstance(named, str) else _WEIGHTS
    first = next((folder / name for name in candidates if (folder / name).is_file()), None)
    if first is None:
        other = _other_weights(folder)
        instead = f" but {other}" if other else ""
        raise RGTGError(
            f"it contains no weights ({candidates[0]}){instead}: {_SAVE}, or complete the download"
        )
    if first.suffix != ".json":
        return [first]
    shards = read_json(first).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise RGTGError(f"its {first.name} has no weight_map of file names: {_SAVE} again")
    paths = [folder / name for name in sorted(set(shards.values()))]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise RGTGError(
            f"its {first.name} names {len(paths)} files and {len(absent)} of them are absent ({absent[0]!r}): complete "
            "the download"
        )
    return paths


def _check_dtypes(file: Path, header: dict[str, dict[str, Any]]) -> None:
    """Refuses integers as weights, whose values transformers would take as they are."""
    for key, entry in header.items():
        if key.endswith(".weight") and entry["dtype"].startswith(_QUANTIZED_DTYPES):
            raise RGTGError(
                f"its {file.name} holds {key!r} as {entry['dtype']} and its {CONFIG} names no quantization_config: it "
                "is quantized; name the unquantized model"
            )
