"""What lies in a model's folder, seen before any library reads it: files that cannot be weights are refused by name."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rgtg_fast.errors import RGTGError

CONFIG = "config.json"
# The names under which transformers looks for weights, in its order.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_OTHER_WEIGHTS = {
    "*.gguf": "weights in GGUF",
    "*.onnx": "weights for ONNX",
    "tf_model.h5": "weights of TensorFlow",
    "flax_model.msgpack": "weights of Flax",
    "consolidated*": "weights in Meta's or Mistral's own format",
    "*.ckpt": "a checkpoint of Lightning",
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
_POINTER = b"version https://git-lfs"
# Kinds of numbers that safetensors names and that are no weights unless a quantisation says how to read them.
_CODES = ("I", "U", "F8", "F4", "BOOL")
_SAVE = "save it with save_pretrained(folder)"


@dataclass(frozen=True)
class Tensors:
    """The tensors of a folder's weight files.

    Attributes:
        shapes: of every tensor by its name in the files; empty where the files are pickled.
        parameters: numbers in all of them, None where the files are pickled.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: int | None = None


def check_model(source: Path) -> Tensors:
    """Looks at a model's folder before it is loaded.

    Args:
        source: an existing path.

    Returns:
        The names and shapes of the tensors, from the headers of the files.

    Raises:
        RGTGError: a file in the place of a folder, no configuration, no weights, or files that cannot be read; without
            the model's role and name, which the caller knows.
    """
    if source.is_file():
        raise RGTGError(_single_file(source))
    if not (source / CONFIG).is_file():
        raise RGTGError(f"it holds no {CONFIG}{_instead(source)}")
    config = read_json(source / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise RGTGError(f"its {CONFIG} names no model_type: {_SAVE} from transformers")
    if (source / "generation_config.json").is_file():
        read_json(source / "generation_config.json")
    files = _weight_files(source, config)
    if any(file.suffix != ".safetensors" for file in files):
        for file in files:
            # torch's format is a zip archive, whose table of contents comes last.
            if _first_bytes(file).startswith(b"PK") and not zipfile.is_zipfile(file):
                raise RGTGError(f"its {file.name} was cut off: download or save it again")
        return Tensors()
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        header = safetensors_header(file)
        if not config.get("quantization_config"):
            _check_numbers(file, header)
        shapes |= {key: tuple(entry["shape"]) for key, entry in header.items()}
    return Tensors(shapes, sum(math.prod(shape) for shape in shapes.values()))


def check_tokenizer(source: Path) -> None:
    """Looks at a tokenizer's files before they are loaded.

    Raises:
        RGTGError: none there, or one that cannot be read.
    """
    present = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not any(any(source.glob(pattern)) for pattern in ("tokenizer.json", "*vocab*", "*.model")):
        raise RGTGError(
            "it holds no tokenizer (tokenizer.json): save it there with tokenizer.save_pretrained(folder), or pass a "
            "(model, tokenizer) pair"
        )
    for path in [*present, *source.glob("*.jinja")]:
        if path.suffix == ".json":
            read_json(path)
        else:
            _first_bytes(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        RGTGError: a pointer file, no JSON, or JSON that is no object.
    """
    _first_bytes(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RGTGError(f"its {path.name} is not readable JSON ({_short(error)}): {_SAVE} again") from error
    if not isinstance(found, dict):
        raise RGTGError(f"its {path.name} is no JSON object: {_SAVE} again")
    return found


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Kind, shape and place of every tensor of a safetensors file, by its name.

    Raises:
        RGTGError: a pointer file, a cut one, or no safetensors at all.
    """
    size = path.stat().st_size
    length = int.from_bytes(_first_bytes(path)[:8], "little")
    again = "download or save it again"
    if size < 8 or length > size - 8:
        raise RGTGError(f"its {path.name} is no safetensors file, or was cut off ({size} bytes): {again}")
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        for entry in header.values():
            if min(entry["shape"], default=0) < 0 or not isinstance(entry["dtype"], str):
                raise ValueError(f"shape {entry['shape']}")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise RGTGError(
            f"its {path.name} has no header that can be read ({_short(error)}): {again}"
        ) from error
    if end != size - 8 - length:
        raise RGTGError(
            f"its {path.name} holds {size - 8 - length} bytes of weights where its header counts {end}: it was cut "
            f"off; {again}"
        )
    return header


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:80] or type(error).__name__


def _first_bytes(path: Path) -> bytes:
    """The beginning of a file, which is refused where it only points to the file."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise RGTGError(
            f"its {path.name} cannot be read ({error.strerror or error}): check its permissions"
        ) from error
    if start.startswith(_POINTER):
        raise RGTGError(
            f"its {path.name} is a pointer of Git LFS, not the file: run `git lfs pull` in the folder"
        )
    if not start:
        raise RGTGError(f"its {path.name} is empty: download or save it again")
    return start


def _single_file(source: Path) -> str:
    if source.suffix == ".gguf":
        return (
            "it is a GGUF file, whose weights are quantised: name the folder of the original model, or convert it "
            f"(AutoModelForCausalLM.from_pretrained(folder, gguf_file={source.name!r}))"
        )
    return f"it is a file: name the folder that holds it, with its {CONFIG}"


def _instead(source: Path) -> str:
    """What a folder without a configuration holds in its place, and the way out."""
    if (source / "adapter_config.json").is_file():
        return " but adapter_config.json: it is an adapter; name it alone as reward or lm, or merge it into its base"
    inner = [
        path.parent
        for path in sorted(source.glob("*/" + CONFIG)) + sorted(source.glob("snapshots/*/" + CONFIG))
    ]
    if inner:
        return f": name the folder inside it, such as {str(inner[-1].relative_to(source))!r}"
    for pattern, what in _OTHER_WEIGHTS.items():
        if any(source.glob(pattern)):
            return f" but {what}: name the folder that transformers' save_pretrained wrote"
    if not any(source.iterdir()):
        return " (it is empty): name a folder that a model was saved to"
    return ": name a folder that a model was saved to"


def _weight_files(source: Path, config: dict[str, Any]) -> list[Path]:
    named = config.get("transformers_weights")
    names = (named,) if isinstance(named, str) else _WEIGHTS
    first = next((source / name for name in names if (source / name).is_file()), None)
    if first is None:
        other = next((what for pattern, what in _OTHER_WEIGHTS.items() if any(source.glob(pattern))), None)
        held = f" but {other}" if other else ""
        raise RGTGError(f"it holds no weights ({names[0]}){held}: {_SAVE}, or complete the download")
    if first.suffix != ".json":
        return [first]
    shards = read_json(first).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise RGTGError(f"its {first.name} has no weight_map of file names: {_SAVE} again")
    paths = [source / name for name in sorted(set(shards.values()))]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise RGTGError(
            f"its {first.name} names {len(paths)} files and {len(absent)} of them are absent ({absent[0]!r}): complete "
            "the download"
        )
    return paths


def _check_numbers(file: Path, header: dict[str, dict[str, Any]]) -> None:
    """Refuses integers in the place of weights, which transformers would take for the weights' values."""
    for key, entry in header.items():
        if key.endswith(".weight") and entry["dtype"].startswith(_CODES):
            raise RGTGError(
                f"its {file.name} holds {key!r} as {entry['dtype']} and its {CONFIG} names no quantization_config: it "
                "is quantised; name the unquantised model"
            )


def names(keys: Iterable[str], shown: int = 2) -> str:
    """A few of some keys, quoted since a file may name them anything, and how many more there are."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return ", ".join(repr(key[:120]) for key in ordered[:shown]) + more
