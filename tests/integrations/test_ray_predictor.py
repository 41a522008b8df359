"""The actor of Ray Data by itself: it needs no Ray."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from rgtg_fast import Guidance, RGTGError
from rgtg_fast.integrations.ray import RewardGuidedPredictor
from tests.conftest import make_lm, make_rm, make_tokenizer

GUIDANCE = Guidance(k=4, beta=2.0, temperature=0.8)
PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w4 w5"]


def predictor(reward: Any = "sequence", **settings: Any) -> RewardGuidedPredictor:
    tokenizer = make_tokenizer()
    own = (make_rm(), tokenizer) if reward == "sequence" else reward
    given = {"guidance": GUIDANCE, "max_new_tokens": 8, "max_batch": 2, **settings}
    return RewardGuidedPredictor((make_lm(), tokenizer), own, **given)


def column(*values: Any) -> np.ndarray:
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made


def test_answers_are_the_decoders_in_any_partition() -> None:
    actor = predictor(seed_column="seed")
    seeds = np.array([3, 1, 4, 5])
    whole = actor({"prompt": column(*PROMPTS), "seed": seeds})
    parts = [actor({"prompt": column(*PROMPTS[at]), "seed": seeds[at]}) for at in (slice(0, 3), slice(3, 4))]
    wanted = actor.decoder.generate(PROMPTS, 8, GUIDANCE, seed=seeds.tolist())
    for name in ("answer", "reward", "finish_reason", "error"):
        assert whole[name].tolist() == [value for part in parts for value in part[name].tolist()]
    assert whole["answer"].tolist() == [row.text for row in wanted]
    assert [ids.tolist() for ids in whole["tokens"]] == [row.tokens for row in wanted]
    assert whole["reward"].tolist() == [row.reward for row in wanted]
    assert whole["error"].tolist() == [""] * 4
    assert whole["seed"] is seeds


def test_chats_and_ids_are_read_as_ray_hands_them_over() -> None:
    actor = predictor()
    chat = column({"role": "user", "content": "w1", "name": None})
    ids = np.array([7, 8, 9])
    found = actor({"prompt": column(chat, ids)})
    wanted = actor.decoder.generate([[{"role": "user", "content": "w1"}], [7, 8, 9]], 8, GUIDANCE)
    assert found["answer"].tolist() == [row.text for row in wanted]
    table = actor({"prompt": np.array([[7, 8, 9], [7, 8, 10]])})
    assert table["answer"][0] == wanted[1].text


def test_a_bad_row_keeps_the_others() -> None:
    actor = predictor()
    found = actor({"prompt": column("w1 w2 w3", None, "", "w1 " * 200, [99], 3.5, "w4 w5")})
    errors = found["error"].tolist()
    assert [bool(error) for error in errors] == [False, True, True, True, True, True, False]
    assert "the prompt has 200 tokens" in errors[3]
    assert "99" in errors[4]
    assert found["answer"][1] is None
    assert found["tokens"][1].tolist() == []
    assert math.isnan(found["reward"][1])
    wanted = actor.decoder.generate(["w1 w2 w3", "w4 w5"], 8, GUIDANCE)
    assert found["answer"][[0, 6]].tolist() == [row.text for row in wanted]


def test_a_reward_that_is_nan_costs_its_own_row() -> None:
    def reward(prefixes: list[list[int]], candidates: torch.Tensor) -> torch.Tensor:
        rows = [math.nan if len(prefix) > 5 and prefix[0] == 12 else 0.5 for prefix in prefixes]
        return torch.tensor(rows).unsqueeze(-1).expand(candidates.shape)

    actor = predictor(reward)
    found = actor({"prompt": column("w1 w2 w3", "w6 w7 w8 w9", "w4 w5")})
    assert [bool(error) for error in found["error"]] == [False, True, False]
    assert "the prompt, step" in found["error"][1]
    assert "NaN" in found["error"][1]
    wanted = actor.decoder.generate(["w1 w2 w3", "w4 w5"], 8, GUIDANCE)
    assert found["answer"][[0, 2]].tolist() == [row.text for row in wanted]


def test_settings_are_refused_when_an_actor_starts() -> None:
    with pytest.raises(RGTGError, match="max_new_tokens=0"):
        predictor(max_new_tokens=0)
    with pytest.raises(RGTGError, match="support='all'"):
        predictor(guidance=Guidance(support="all"))
    with pytest.raises(RGTGError, match=r"'question'.*columns: prompt"):
        predictor(prompt="question")({"prompt": column("w1")})
    with pytest.raises(RGTGError, match="column 'answer'"):
        predictor()({"prompt": column("w1"), "answer": column("w2")})
    with pytest.raises(RGTGError, match="batch_format"):
        predictor()([1, 2])  # pyright: ignore[reportArgumentType]
