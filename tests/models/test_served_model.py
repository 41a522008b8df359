"""A base model that another engine executes: what is read of its files, and when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rgtg_fast import ContrastiveReward, RequestScorer, RGTGError
from rgtg_fast.models import served_model
from tests.conftest import make_lm, make_rm, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm")
    model = make_lm(0)
    model.generation_config.eos_token_id = [1, 5]
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_weights_are_read_only_where_the_reward_executes_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    load = served_model.load_causal_lm
    monkeypatch.setattr(served_model, "load_causal_lm", lambda *args: read.append(args[0]) or load(*args))
    scorer = RequestScorer.from_pretrained(str(folder), (make_rm(1), None), max_requests=1, max_length=32)
    request = scorer.add("w1 w2")
    expected = make_rm(1)(torch.tensor([[*scorer._requests[request].prefix.prompt_ids, 9]])).logits.item()
    assert scorer.score([request], torch.tensor([[9]])).item() == pytest.approx(expected, abs=1e-5)
    assert read == []
    assert (scorer.vocabulary, scorer.max_length, scorer.eos_ids) == (64, 32, frozenset({1, 5}))
    RequestScorer.from_pretrained(str(folder), ContrastiveReward(), max_requests=1, max_length=64)
    assert read == [str(folder)]


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RGTGError, match="does not exist: check the path"):
        RequestScorer.from_pretrained(str(tmp_path / "none"), (make_rm(1), None))
