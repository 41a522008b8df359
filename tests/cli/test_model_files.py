"""`generate` with GGUF files, and with models that come with their own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import code_models, gguf_files


def test_two_gguf_files(run: Callable, tmp_path: Path, own_folders: Path) -> None:
    pytest.importorskip("gguf")
    lm = gguf_files.save(tmp_path / "lm.gguf", gguf_files.tiny(), "Q8_0")
    rm = gguf_files.save(tmp_path / "rm.gguf", gguf_files.tiny(head=True, seed=1), "F16")
    outcome = run("generate", "he a", "--lm", lm, "--reward", rm, "--max-new-tokens", "3", "--json")
    assert json.loads(outcome.out)["lm"] == str(lm)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_code_runs_where_the_option_says_so(run: Callable, tmp_path: Path, own_folders: Path) -> None:
    folder = code_models.save(tmp_path / "own", tmp_path / "ran")
    args = ("generate", "w1 w2", "--lm", folder, "--reward", "none", "--max-new-tokens", "3", "--json")
    assert "--trust-remote-code" in run(*args).error
    assert not (tmp_path / "ran").exists()
    assert json.loads(run(*args, "--trust-remote-code").out)["lm"] == str(folder)
    assert (tmp_path / "ran").exists()
