"""Reads a GGUF file's metadata and tensors with the `gguf` package, which accepts tensors at wrong places."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from rgtg_fast.errors import RGTGError, one_line


class File(NamedTuple):
    """A GGUF file that was read: metadata by key, tensors of `gguf` by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]


def read(path: Path, title: str) -> File:
    """Reads a file; its tensors are mapped, not loaded.

    Args:
        path: the file.
        title: role and name of the model, for messages.

    Raises:
        RGTGError: it is damaged, cut off or one part of several.
    """
    import gguf

    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        reader = gguf.GGUFReader(path)
        _check_offsets(reader)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # of a damaged file the reader may raise anything
        raise RGTGError(
            f"{title} is not a GGUF file that can be read, or was cut off ({one_line(error, 80)}): download it again"
        ) from error
    if metadata.get("split.count", 0) not in (0, 1):
        raise RGTGError(
            f"{title} is one part of a GGUF in {metadata['split.count']} files: merge them "
            "(llama-gguf-split --merge FIRST-PART OUTPUT.gguf)"
        )
    return File(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def _check_offsets(reader: Any) -> None:
    """Refuses tensors that do not follow one another: llama.cpp demands it, and a damaged offset shows."""
    expected = reader.data_offset
    for tensor in reader.tensors:
        if tensor.data_offset != expected:
            raise ValueError(f"{tensor.name} is at byte {tensor.data_offset}, not {expected}")
        expected += -(-tensor.n_bytes // reader.alignment) * reader.alignment


def values(tensor: Any) -> torch.Tensor:
    """The dequantized numbers of a tensor of a file, in float32 or the file's own float dtype."""
    import gguf

    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
