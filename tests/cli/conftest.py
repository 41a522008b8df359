"""Tiny models on disk and ways to run the command line."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tests.cli.support import CONTEXT, HANGS, Outcome, Run, command, environment, runner
from tests.models.kinds import tiny
from tests.models.kinds.tiny import save


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte and three special ones, with or without a chat template."""
    return tiny.byte_tokenizer(tiny.CHAT_TEMPLATE if chat else None)


def config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": len(byte_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(settings | changes))


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def lm(models_folder: Path) -> str:
    torch.manual_seed(0)
    return save(LlamaForCausalLM(config(initializer_range=0.3)), models_folder / "lm")


@pytest.fixture(scope="session")
def rm(models_folder: Path) -> str:
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config(num_labels=1, initializer_range=0.3))
    return save(model, models_folder / "rm")


@pytest.fixture(scope="session")
def nan_rm(models_folder: Path) -> str:
    """A reward model whose reward of the tilde alone is NaN."""
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config(num_labels=1, initializer_range=0.3))
    with torch.no_grad():
        model.model.embed_tokens.weight[byte_tokenizer().convert_tokens_to_ids("~")] = float("nan")
    return save(model, models_folder / "nan_rm")


@pytest.fixture(scope="session")
def two_labels_rm(models_folder: Path) -> str:
    model = LlamaForSequenceClassification(config(num_labels=2))
    return save(model, models_folder / "two_labels_rm")


@pytest.fixture(scope="session")
def plain_lm(models_folder: Path) -> str:
    """A language model without a chat template."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(initializer_range=0.3))
    return save(model, models_folder / "plain_lm", byte_tokenizer(chat=False))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process."""
    return runner(capsys)


@pytest.fixture
def run_process() -> Run:
    """Runs the command line in a process of its own."""

    def call(*args: object, stdin: str | None = None) -> Outcome:
        done = subprocess.run(
            command(*args), capture_output=True, text=True, input=stdin, env=environment(), timeout=HANGS
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def prompts_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a prompts file: rows as JSON, texts as they are."""

    def write(*rows: Any, name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write
