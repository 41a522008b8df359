"""`generate` with GGUF files, and with models that come with their own code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.models import code_models, gguf_files


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of this test for the code of models."""
    folder = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def test_two_gguf_files(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("RGTG_CACHE", str(tmp_path / "cache"))
    lm = gguf_files.save(tmp_path / "lm.gguf", gguf_files.tiny(), "Q8_0")
    rm = gguf_files.save(tmp_path / "rm.gguf", gguf_files.tiny(head=True, seed=1), "F16")
    outcome = run("generate", "he a", "--lm", lm, "--reward", rm, "--max-new-tokens", "3", "--json")
    assert json.loads(outcome.out)["lm"] == str(lm)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_code_runs_where_the_option_says_so(run: Callable, tmp_path: Path, modules: None) -> None:
    folder = code_models.save(tmp_path / "own", tmp_path / "ran")
    args = ("generate", "w1 w2", "--lm", folder, "--reward", "none", "--max-new-tokens", "3", "--json")
    assert "--trust-remote-code" in run(*args).error
    assert not (tmp_path / "ran").exists()
    assert json.loads(run(*args, "--trust-remote-code").out)["lm"] == str(folder)
    assert (tmp_path / "ran").exists()
