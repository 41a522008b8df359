"""GGUF files that are cut off or damaged are refused in one line, or give the model that was written."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from rgtg_fast import RGTGError
from rgtg_fast.models.pretrained import read_pretrained
from tests.models import gguf_files

gguf = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RGTG_CACHE", str(tmp_path / "cache"))


def model_or_refusal(path: Path) -> Any:
    """The model of a file, or the line with which it is refused."""
    try:
        return read_pretrained(tf.AutoModelForCausalLM, path, "language model", torch.float32)[0]
    except RGTGError as error:
        return str(error)


def test_files_that_are_cut_off(tmp_path: Path) -> None:
    whole = gguf_files.save(tmp_path / "m.gguf", gguf_files.tiny()).read_bytes()
    for length in (3, 20, 1000, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        assert "cut off" in model_or_refusal(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"")
    assert "is empty" in model_or_refusal(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60))
    assert "cut off" in model_or_refusal(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in model_or_refusal(tmp_path / "cut.gguf")
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(whole)
    assert "llama-gguf-split --merge" in model_or_refusal(tmp_path / "m-00001-of-00003.gguf")


def test_a_tensor_at_another_place_is_refused(tmp_path: Path) -> None:
    """A damaged offset names bytes of other tensors, which would be read as this one's weights."""
    path = gguf_files.save(tmp_path / "m.gguf", gguf_files.tiny())
    content = bytearray(path.read_bytes())
    name = b"blk.1.ffn_up.weight"
    # Behind the name: the number of dimensions, two dimensions, the dtype, the offset.
    offset = content.index(name) + len(name) + 4 + 2 * 8 + 4
    before = struct.unpack_from("<Q", content, offset)[0]
    for place in (0, before - 32, before + 32, before + 2, 2**63):
        struct.pack_into("<Q", content, offset, place)
        path.write_bytes(content)
        assert (
            "can be read, or was cut off (blk.1.ffn_up.weight is at byte" in model_or_refusal(path)
            or place == 2**63
        )


def test_damaged_files_are_refused_in_one_line_or_equal(tmp_path: Path) -> None:
    """Bytes of metadata and of the tensors' descriptions that are changed, and files that end early."""
    rng, model = random.Random(5), gguf_files.tiny("qwen3")
    path = gguf_files.save(tmp_path / "m.gguf", model)
    whole, end = path.read_bytes(), gguf.GGUFReader(path).data_offset
    own, outcomes = model.state_dict(), set()
    for _ in range(40):
        content = bytearray(whole)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        else:
            content[rng.randrange(end)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        loaded = model_or_refusal(path)
        outcomes.add(type(loaded))
        if isinstance(loaded, str):
            assert "\n" not in loaded
        else:
            assert all(torch.equal(x, own[name]) for name, x in loaded.state_dict().items())
    assert len(outcomes) == 2


def test_a_damaged_conversion_is_refused_with_its_folder(tmp_path: Path) -> None:
    """Such as one from which a tool that tidies caches has deleted the largest file."""
    path = gguf_files.save(tmp_path / "m.gguf", gguf_files.tiny())
    assert not isinstance(model_or_refusal(path), str)
    (folder,) = (tmp_path / "cache").glob("m-*")
    weights = (folder / "model.safetensors").read_bytes()
    for content in (None, weights[:-40]):
        (folder / "model.safetensors").unlink()
        if content is not None:
            (folder / "model.safetensors").write_bytes(content)
        assert f"(converted into {folder}: delete that folder to convert it again)" in model_or_refusal(path)
        (folder / "model.safetensors").write_bytes(weights)
