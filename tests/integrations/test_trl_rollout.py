"""The example for TRL, run on tiny models."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
from rgtg_fast import RewardGuidedDecoder
from tests.conftest import make_lm, make_rm, make_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_step_answers_with_the_weights_of_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    spec = importlib.util.spec_from_file_location("trl_rollout", ROOT / "examples" / "trl_rollout.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for name, model in {"lm": make_lm(), "rm": make_rm()}.items():
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    own, weights = example.GuidedRollouts.__call__, []

    def checked(self: Any, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        first = self.seed
        output = own(self, prompts, trainer)
        policy = make_lm()
        policy.load_state_dict(trainer.model.state_dict())
        weights.append(policy.model.layers[0].mlp.up_proj.weight.detach().clone())
        fresh = RewardGuidedDecoder.from_pretrained((policy, make_tokenizer()), reward=str(tmp_path / "rm"))
        seeds = list(range(first, first + len(prompts)))
        rows = fresh.generate(prompts, 12, example.GUIDANCE, seed=seeds)
        for row, ids, logprobs in zip(rows, output["completion_ids"], output["logprobs"], strict=True):
            assert ids == row.tokens + ([] if row.end_token is None else [row.end_token])
            assert sum(logprobs) == pytest.approx(row.guided_logprob, abs=1e-4)
            assert len(logprobs) == len(ids)
        return output

    monkeypatch.setattr(example.GuidedRollouts, "__call__", checked)
    example.main(str(tmp_path / "lm"), str(tmp_path / "rm"), 4, str(tmp_path / "output"))
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]) == 4
    assert len(weights) >= 2
    assert not torch.equal(weights[0], weights[-1]), "the policy was trained between the rollouts"
