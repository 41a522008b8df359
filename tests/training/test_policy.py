"""`train_policy`: what it learns, what it saves, that nothing is lost, and that the policy decodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

pytest.importorskip("trl", reason="policies are trained by trl")
pytest.importorskip("peft", reason="LoRA training needs peft")

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, SequenceReward
from rgtg_fast.models.loading import load_causal_lm
from rgtg_fast.training.labels import reward_function
from rgtg_fast.training.policy.config import PolicyTrainConfig
from rgtg_fast.training.policy.launch import train_policy
from rgtg_fast.training.t_reg import Templates
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.models.adapters import write_adapter
from tests.training.support import CHOSEN, rows, save_lm, settings_by_day

TEMPLATES = Templates("w1 {question} w2 {answer} w3", "w1 {question} w2 {answer} w4")
QUICK = PolicyTrainConfig(
    learning_rate=0.01,
    max_length=64,
    held_out=0,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("base") / "lm")


def train(base: Path, output: Path, **settings: Any) -> Any:
    recipe = settings.pop("config", QUICK)
    kind = settings.get("objective", recipe.objective)
    arguments = {"logging_steps": 1, "device": "cpu", **settings}
    if kind.startswith("treg"):
        arguments.setdefault("templates", TEMPLATES)
    return train_policy(base, arguments.pop("data", rows(40)), output, recipe, **arguments)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors"
    return load_file(folder / (name if (folder / name).exists() else "model.safetensors"))


@pytest.mark.parametrize(
    "settings",
    settings_by_day(
        {"objective": "dpo"},
        {"objective": "simpo", "margin": 0.5},
        {"objective": "treg", "alpha": 0.5},
        {"objective": "treg_simpo"},
        {"objective": "treg", "full": True, "fork_layer": 1, "learning_rate": 3e-3},
        {"objective": "treg", "bf16": True, "fork_layer": 2, "gradient_checkpointing": True},
    ),
    ids=str,
)
def test_it_learns(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    result = train(
        base, tmp_path / "out", data=rows(100), eval_data=rows(40, seed=1), num_train_epochs=3, **settings
    )
    # Four standard deviations above chance.
    assert result.metrics["accuracy"] > 0.82
    facts = json.loads((tmp_path / "out" / "rgtg_fast.json").read_text())
    assert facts["recipe"]["objective"] == settings["objective"]
    assert facts["metrics"]["accuracy"] == result.metrics["accuracy"]
    assert (facts["templates"] is None) == (not settings["objective"].startswith("treg"))
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert all(row["pairs_per_second"] > 0 for row in log if "loss" in row)
    # What lies below the fork is the base's.
    before = load_file(base / "model.safetensors")
    frozen = range(settings.get("fork_layer", 0))
    for name, weight in weights(tmp_path / "out").items():
        below = any(f"layers.{i}." in name for i in frozen)
        assert not below or ("lora" not in name and torch.equal(weight, before[name]))


def share(decoder: RewardGuidedDecoder, words: range) -> float:
    """Share of the sampled answers' tokens that are of these words."""
    prompts = [row["prompt"] for row in rows(16, seed=3)]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    result = decoder.generate(chats, 12, Guidance(k=20, temperature=1.0), seed=list(range(16)))
    tokens = [token for row in result for token in row.tokens]
    return sum(token in words for token in tokens) / len(tokens)


def test_the_policy_decodes_unguided_and_guided(base: Path, tmp_path: Path) -> None:
    folder, merged = tmp_path / "policy", tmp_path / "merged"
    # RLOO's policies write what is rewarded; preference losses may well write neither answer.
    reward = lambda completion_ids, **_: [float(sum(t in CHOSEN for t in ids)) for ids in completion_ids]  # noqa: E731
    train(
        base,
        folder,
        objective="rloo",
        reward=reward,
        max_completion_length=8,
        num_train_epochs=3,
        data=rows(60),
        merged=merged,
    )
    before = RewardGuidedDecoder.from_pretrained(str(base))
    policy = RewardGuidedDecoder.from_pretrained(str(folder))
    assert share(policy, CHOSEN) > share(before, CHOSEN) + 0.2
    assert policy.describe()["lm_engine"] == before.describe()["lm_engine"]
    assert policy.lm.eos_ids == before.lm.eos_ids

    # The same model by three loaders.
    ids = torch.tensor([[9, 8, 7, 6]])
    ours: Any = load_causal_lm(str(folder), "cpu", None)[0]
    for source in (folder, merged):
        theirs: Any = AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)

    # A guide that is an adapter of the policy's own base keeps that base.
    guide = write_adapter(tmp_path / "guide", _reward_base(base), fork=1)
    guided = RewardGuidedDecoder.from_pretrained(str(folder), reward=str(guide))
    assert isinstance(guided.reward, SequenceReward)
    assert "a model of its own" in str(guided.describe()["reward_trunk"])
    alone = RewardGuidedDecoder.from_pretrained(
        str(base), reward=SequenceReward(str(guide), share_trunk=False)
    )
    prompt = [[{"role": "user", "content": "w3 w4"}]]
    answer = guided.generate(prompt, 6, Guidance(k=5, beta=4.0, temperature=0))[0]
    assert answer.rewards
    expected = alone.score(prompt, ["w3 w4 w5"])[0]
    assert guided.score(prompt, ["w3 w4 w5"])[0] == pytest.approx(expected, abs=1e-5)


def _reward_base(base: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)


def test_adapters_that_are_no_policies(base: Path, tmp_path: Path) -> None:
    guide = write_adapter(tmp_path / "guide", _reward_base(base))
    with pytest.raises(RGTGError, match="is a reward model's adapter"):
        RewardGuidedDecoder.from_pretrained(str(guide))
    other = save_lm(tmp_path / "other", num_hidden_layers=2)
    train(base, tmp_path / "policy", limit=8)
    config = tmp_path / "policy" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(other)))
    with pytest.raises(RGTGError, match="trained on other weights"):
        RewardGuidedDecoder.from_pretrained(str(tmp_path / "policy"))
    config.write_text(config.read_text().replace(str(other), str(tmp_path / "a" / "gone")))
    with pytest.raises(RGTGError, match=r"gone' does not exist"):
        RewardGuidedDecoder.from_pretrained(str(tmp_path / "policy"))


class _Broken(TrainerCallback):
    """Ends a run as a kill would: without another word, and with half a line in the log."""

    def __init__(self, step: int, log: Path):
        self.step, self.log = step, log

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with self.log.open("a") as file:
                file.write('{"step": 5, "lo')
            raise KeyboardInterrupt


@pytest.mark.parametrize("objective", ["treg", "rloo"])
def test_a_broken_run_goes_on_to_the_same_weights(base: Path, tmp_path: Path, objective: str) -> None:
    settings: dict[str, Any] = {"objective": objective, "save_steps": 2, "num_train_epochs": 1.0}
    if objective == "rloo":
        settings |= {
            "reward": lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
            "max_completion_length": 6,
            "data": rows(12),
        }
    train(base, tmp_path / "whole", **settings)
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train(base, broken, callbacks=[_Broken(5, broken / "training_log.jsonl")], **settings)
    assert not (broken / "adapter_model.safetensors").exists()
    with pytest.raises(RGTGError, match="is not empty"):
        train(base, broken, **settings)
    with pytest.raises(RGTGError, match="began with learning_rate"):
        train(base, broken, resume=True, learning_rate=0.02, **settings)
    if objective == "treg":
        other = Templates(TEMPLATES.better, TEMPLATES.worse + " w9")
        with pytest.raises(RGTGError, match="began with templates="):
            train(base, broken, resume=True, templates=other, **settings)
    train(base, broken, resume=True, **settings)
    a, b = weights(tmp_path / "whole"), weights(broken)
    assert set(a) == set(b)
    if objective == "treg":
        assert all(torch.equal(a[name], b[name]) for name in a)
    steps = [json.loads(line)["step"] for line in (broken / "training_log.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, max(steps) + 1))


def test_token_rewards_are_shared_between_runs(base: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        train(base, tmp_path / name, objective="treg", token_cache=tmp_path / "tokens", limit=8)
    kinds = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "tokens").glob("*.f32"))
    assert kinds == ["reference", "token-rewards"]


def test_rewards_of_sampled_answers_are_the_reward_models(tmp_path: Path) -> None:
    network: Any = make_lm()
    reward_model: Any = make_rm()
    reward_model.save_pretrained(tmp_path / "rm")
    make_tokenizer().save_pretrained(tmp_path / "rm")
    reward = reward_function(str(tmp_path / "rm"), network, make_tokenizer(), batch=2)
    prompts = [[{"role": "user", "content": text}] for text in ("w1 w2", "w3", "w4 w5 w6")]
    answers = [[20, 21, 1], [22], [23, 24, 25, 26, 1]]
    found = reward(prompts=prompts, completions=None, completion_ids=answers, trainer_state=None)
    tokenizer = make_tokenizer()
    for prompt, answer, value in zip(prompts, answers, found, strict=True):
        text = f"<user> {prompt[0]['content']} <assistant>"
        ids = [*tokenizer(text)["input_ids"], *answer]
        with torch.no_grad():
            hidden = reward_model.model(torch.tensor([ids]), use_cache=False).last_hidden_state
        assert value == pytest.approx(reward_model.score(hidden[0, -1]).item(), abs=1e-5)
    words = [*make_tokenizer().get_vocab()]
    other = make_tokenizer(words=sorted(words, key=lambda word: (word.startswith("w"), word[::-1])))
    other.save_pretrained(tmp_path / "rm")
    with pytest.raises(RGTGError, match="another vocabulary"):
        reward_function(str(tmp_path / "rm"), network, make_tokenizer())


def test_rloo_maximises_a_reward_model(base: Path, tmp_path: Path) -> None:
    guide = write_adapter(tmp_path / "guide", _reward_base(base), fork=2)
    data = [{"prompt": row["prompt"]} for row in rows(20)] + [{"text": "no prompt"}]
    result = train(
        base,
        tmp_path / "out",
        objective="rloo",
        reward=str(guide),
        data=data,
        max_completion_length=6,
        num_iterations=2,
    )
    assert {"reward", "kl"} <= set(result.metrics)
    assert result.data["train"]["malformed"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "ppo"}, "TRL has no PPO trainer since version 1.13; use 'rloo'"),
        ({"objective": "orpo"}, "objective='orpo' is unknown"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": 0.0}, "leaves dpo no preference"),
        ({"margin": float("inf")}, "margin=inf"),
        ({"objective": "rloo", "num_generations": 1}, "nothing to compare"),
        ({"objective": "rloo", "num_generations": 3}, "not a multiple of num_generations=3"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 is not above 0"),
        ({"lora_rank": 0}, "LoRA rank 0"),
        ({"unknown": 1}, "there is no setting 'unknown'"),
        ({"max_length": 4096}, "max_length=4096 exceeds the model's context: use at most 128"),
        ({"fork_layer": 3}, "leaves no layer to adapt"),
        ({"fork_layer": 7}, "fork_layer=7 is not in 0..3"),
        ({"templates": TEMPLATES}, "dpo has no token rewards"),
        ({"reward": "some/where"}, "dpo learns from pairs and takes no reward"),
        ({"objective": "rloo"}, "rloo needs a reward"),
        ({"objective": "rloo", "reward": len, "max_completion_length": 64}, "leaves no tokens for a prompt"),
        ({"objective": "rloo", "reward": len, "data": [{"text": "w1"}]}, "no prompts are left of the 1 rows"),
    ],
    ids=str,
)
def test_what_cannot_be(base: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    settings.setdefault("max_completion_length", 8)
    with pytest.raises(RGTGError, match=message) as error:
        train(base, tmp_path / "out", **settings)
    assert "\n" not in str(error.value)


def test_without_trl(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else find(name))
    with pytest.raises(RGTGError, match=r'needs trl: pip install "rgtg-fast\[policy\]"'):
        train(base, tmp_path / "out")
