"""The guides that come with the package: their files, their names, and what they do to the model they were made for."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from rgtg_fast import Guidance, RewardGuidedDecoder, SequenceReward, bundled
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter
from tests.conftest import make_lm, make_tokenizer

GUIDES = ("bundled:args", "bundled:pargs")
OBJECTIVES = {"bundled:args": "full_bt", "bundled:pargs": "partial_bt"}
LIMIT = 6 * 2**20
PROMPTS = ["How do I make tea?", "My neighbour plays loud music at night. What should I do?"]


def test_both_are_there_and_small() -> None:
    assert bundled.names() == list(GUIDES)
    assert sum(path.stat().st_size for path in bundled.FOLDER.rglob("*") if path.is_file()) < LIMIT


def test_the_former_place_of_the_default_model_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rgtg_fast.app.embedded", raising=False)
    with pytest.warns(DeprecationWarning, match=r"rgtg_fast.app.embedded is now rgtg_fast.bundled"):
        former = importlib.import_module("rgtg_fast.app.embedded")
    assert former.default_model is bundled.default_model


def test_another_name_is_refused() -> None:
    with pytest.raises(
        RGTGError,
        match="'bundled:nothing' is not a bundled reward model: use one of bundled:args, bundled:pargs",
    ):
        bundled.resolve("bundled:nothing")


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_says_how_it_was_made(name: str) -> None:
    folder = Path(bundled.resolve(name))
    facts = json.loads((folder / "rgtg_fast.json").read_text())
    assert facts["recipe"]["objective"] == OBJECTIVES[name]
    assert re.fullmatch("[0-9a-f]{64}", facts["data_sha256"])
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == facts["steps"]
    adapter = Adapter.load(folder)
    assert adapter.fork == facts["recipe"]["fork_layer"]
    assert adapter.base_fingerprint == facts["base_fingerprint"]
    assert adapter.reward_head().weight.shape == (1, 576)


def test_they_differ_in_the_objective_alone() -> None:
    recipes = [json.loads((Path(bundled.resolve(name)) / "rgtg_fast.json").read_text()) for name in GUIDES]
    assert recipes[0]["data_sha256"] == recipes[1]["data_sha256"]
    same = [{k: v for k, v in r["recipe"].items() if k != "objective"} for r in recipes]
    assert same[0] == same[1]


@pytest.mark.parametrize("reward", [*GUIDES, "rad:bundled:args", "mixture:0.5*bundled:pargs+0.5*contrastive"])
def test_beside_another_model_they_say_whose_they_are(reward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *place: pytest.fail("no hub is asked"))
    with pytest.raises(RGTGError) as error:
        RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), reward=reward)
    message = str(error.value)
    assert "adapters of SmolLM2-135M-Instruct, the default language model" in message
    assert "leave out lm, or use reward='contrastive'" in message


@pytest.mark.parametrize("prefix", ["text", "farma", "genarm"])
def test_they_are_sequence_rewards_alone(prefix: str) -> None:
    with pytest.raises(RGTGError, match=r"adapters of SmolLM2-135M-Instruct.*name it alone as the reward"):
        RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), reward=f"{prefix}:bundled:pargs")


@pytest.mark.model
@pytest.mark.parametrize("name", ["bundled:pargs", pytest.param("bundled:args", marks=pytest.mark.slow)])
def test_one_trunk_gives_the_tokens_of_two_models(smollm2: Path, name: str) -> None:
    guidance = Guidance(k=10, beta=5.0, temperature=0)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts, guides = [], []
    for share in (True, False):
        decoder = RewardGuidedDecoder.from_pretrained(smollm2, reward=SequenceReward(name, share_trunk=share))
        rows = decoder.generate(chats, 24, guidance, trace=True)
        texts.append([row.tokens for row in rows])
        guides.append([row.rewards for row in rows])
    assert texts[0] == texts[1]
    torch.testing.assert_close(torch.tensor(guides[0][0]), torch.tensor(guides[1][0]), rtol=1e-3, atol=1e-4)
    assert any(step.token != step.base_token for row in rows for step in row.trace)


@pytest.mark.model
def test_the_rewards_are_those_of_transformers_and_peft(smollm2: Path) -> None:
    peft = pytest.importorskip("peft", reason="the comparison needs peft (the train extra)")
    from transformers import AutoModelForSequenceClassification

    decoder = RewardGuidedDecoder.from_pretrained(smollm2, reward="bundled:pargs")
    answer = "Boil fresh water, warm the pot, and let the leaves steep for four minutes."
    found = decoder.score([[{"role": "user", "content": PROMPTS[0]}]], [answer])[0]
    base = AutoModelForSequenceClassification.from_pretrained(smollm2, num_labels=1, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, bundled.resolve("bundled:pargs")).eval()
    tokenizer = decoder.tokenizer
    assert tokenizer is not None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    words = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        hidden = model.base_model.model.model(torch.tensor([ids + words])).last_hidden_state
        expected = model.base_model.model.score(hidden[0, len(ids) :])[:, 0]
    torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=1e-3, atol=1e-4)
