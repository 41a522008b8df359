"""Training FaRMA and GenARM: what is learned, resumed and saved, and that the decoder serves what training scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from rgtg_fast import Guidance, RewardGuidedDecoder, named_guide
from rgtg_fast.errors import RGTGError
from rgtg_fast.training.config import TrainConfig
from rgtg_fast.training.head_fit import fit
from rgtg_fast.training.launch import train_reward_model
from rgtg_fast.training.losses import Objective
from rgtg_fast.training.model import Lora, add_adapters
from rgtg_fast.training.packing import answer_positions, collate, preceding_positions
from rgtg_fast.training.trainer import PartialRewardTrainer
from rgtg_fast.training.vocabulary import VOCABULARY_HEAD, load_causal
from tests.conftest import make_lm
from tests.training.support import EOS, needs_loaded_heads, rows, save_lm, settings_by_day, tokenized

pytest.importorskip("peft", reason="LoRA training needs peft")

QUICK = TrainConfig(
    token_budget=128, gradient_accumulation_steps=2, learning_rate=0.01, max_length=64, held_out=0
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("base") / "lm")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("tied") / "lm", tie_word_embeddings=True)


def train(base: Path, output: Path, **settings: Any) -> Any:
    arguments = {"config": QUICK, "logging_steps": 1, "device": "cpu", **settings}
    return train_reward_model(base, arguments.pop("data", rows(60)), output, **arguments)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors"
    return load_file(folder / (name if (folder / name).exists() else "model.safetensors"))


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    settings_by_day(
        {"objective": "farma", "num_train_epochs": 2},
        {
            "objective": "farma",
            "num_train_epochs": 2,
            "fork_layer": 2,
            "stop_gradient": True,
            "weight": "pair",
        },
        {"objective": "farma", "num_train_epochs": 4, "fork_layer": 3, "head_learning_rate": 0.05},
        {"objective": "farma", "num_train_epochs": 2, "full": True, "fork_layer": 1, "learning_rate": 3e-3},
        {"objective": "farma", "num_train_epochs": 2, "fork_layer": 1, "bf16": True},
        {"objective": "genarm", "num_train_epochs": 2},
        {"objective": "genarm", "num_train_epochs": 2, "fork_layer": 1, "bf16": True, "beta_r": 0.1},
        {"objective": "genarm", "num_train_epochs": 2, "full": True, "learning_rate": 3e-3},
    ),
    ids=str,
)
def test_it_learns(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    result = train(base, tmp_path / "out", data=rows(150), eval_data=rows(40, seed=1), **settings)
    # Four standard deviations above chance.
    assert result.metrics["accuracy"] > 0.8
    assert result.metrics["loss"] < 0.69
    recipe = json.loads((tmp_path / "out" / "rgtg_fast.json").read_text())["recipe"]
    assert recipe["objective"] == settings["objective"]


def test_a_round_is_a_pass_of_comparisons_and_one_of_the_constraint(base: Path, tmp_path: Path) -> None:
    result = train(
        base, tmp_path / "out", objective="farma", num_train_epochs=2, gradient_accumulation_steps=1
    )
    passes = [row["pass"] for row in read_log(tmp_path / "out") if "loss" in row]
    assert passes == [n for n in (1, 2, 3, 4) for _ in range(result.rows)]
    losses = [row["loss"] for row in read_log(tmp_path / "out") if "loss" in row]
    # All scores begin at zero: answers are equal, and so is every reward to what can be reached.
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    alone = train(
        base, tmp_path / "alone", objective="farma", num_train_epochs=0.5, gradient_accumulation_steps=1
    )
    assert alone.steps == result.rows


def test_the_constraint_shrinks_what_it_measures(base: Path, tmp_path: Path) -> None:
    train(
        base,
        tmp_path / "out",
        data=rows(150),
        objective="farma",
        num_train_epochs=3,
        gradient_accumulation_steps=1,
    )
    logged = [row for row in read_log(tmp_path / "out") if row.get("pass") == 6]
    half = len(logged) // 2
    first, second = (sum(row["loss"] for row in part) / len(part) for part in (logged[:half], logged[half:]))
    assert 0 < second < first


def trainer_on(
    pairs: Any, output: Path, accumulation: int, size: int, objective: Objective
) -> PartialRewardTrainer:
    torch.manual_seed(0)
    model: Any = make_lm()
    head = VOCABULARY_HEAD if objective.name == "farma" else None
    arguments = TrainingArguments(
        output_dir=str(output),
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=size,
        num_train_epochs=objective.passes,
        logging_steps=1,
        learning_rate=0.01,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    model = add_adapters(model, 0, Lora(rank=4), head)
    return PartialRewardTrainer(model, arguments, pairs, token_budget=64, objective=objective)


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(Objective("farma"), marks=pytest.mark.slow),
        Objective("farma", weight="pair"),
        Objective("genarm"),
    ],
)
def test_the_spread_of_a_batch_does_not_matter(tmp_path: Path, objective: Objective) -> None:
    curves = []
    for accumulation, size in ((4, 1), (2, 2), (1, 4)):
        trainer = trainer_on(tokenized(60), tmp_path, accumulation, size, objective)
        trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(curves[0]) == objective.passes * -(-len(trainer.rows) // 4)
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=2e-5)


class _StopAt(TrainerCallback):
    """Ends a run as an interruption would, before the step's checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(2, id="first pass", marks=pytest.mark.slow),
        pytest.param(5, id="between the passes"),
        pytest.param(7, id="constraint"),
    ],
)
def test_a_round_is_resumed_in_its_middle(base: Path, tmp_path: Path, stop: int) -> None:
    common = {
        "objective": "farma",
        "fork_layer": 1,
        "lora_dropout": 0.2,
        "save_steps": 1,
        "num_train_epochs": 1.0,
    }
    whole = train(base, tmp_path / "whole", **common)
    assert whole.steps == 10
    with pytest.raises(InterruptedError):
        train(base, tmp_path / "broken", **common, callbacks=[_StopAt(stop + 1)])
    assert (tmp_path / "broken" / f"checkpoint-{stop}").is_dir()
    train(base, tmp_path / "broken", **common, resume=True)
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    curves = [
        [(row["pass"], row["loss"]) for row in read_log(tmp_path / name) if "loss" in row]
        for name in ("whole", "broken")
    ]
    assert curves[0] == curves[1]
    assert [place for place, _ in curves[0]] == [1] * 5 + [2] * 5


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"objective": "farma", "fork_layer": 1}, marks=needs_loaded_heads),
        pytest.param({"objective": "farma", "fork_layer": 3}, marks=needs_loaded_heads),
        {"objective": "farma", "full": True, "learning_rate": 3e-3},
        {"objective": "genarm", "fork_layer": 1},
        {"objective": "genarm", "full": True, "learning_rate": 3e-3},
    ],
    ids=str,
)
def test_every_loader_gives_what_training_scored(
    base: Path, tied: Path, tmp_path: Path, settings: dict[str, Any], kind: str
) -> None:
    source = tied if kind == "tied" else base
    seen: dict[str, Any] = {}

    def keep(scores: Any) -> dict[str, Any]:
        seen["scores"] = scores
        return {}

    name, full = settings["objective"], settings.get("full", False)
    held = rows(6, seed=1)
    merged = {} if full else {"merged": tmp_path / "whole"}
    train(source, tmp_path / "guide", eval_data=held, metrics=keep, **merged, **settings)
    folders = [tmp_path / "guide", *([] if full else [tmp_path / "whole"])]
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in held for _ in range(2)]
    answers = [row[side] for row in held for side in ("chosen", "rejected")]
    expected = [scores for pair in seen["scores"] for scores in pair]
    assert max(abs(score) for scores in expected for score in scores) > 0.1
    for folder in folders:
        decoder = RewardGuidedDecoder.from_pretrained(str(source), reward=f"{name}:{folder}")
        shared = folder.name == "guide" and not full
        assert ("the base model's" in str(decoder.describe()["reward_trunk"])) == shared
        eos = decoder.tokenizer.eos_token_id
        ids = [[*decoder.tokenizer(answer)["input_ids"], eos] for answer in answers]
        for scores, want in zip(decoder.score(prompts, ids), expected, strict=True):
            sums = torch.tensor(scores).cumsum(0).tolist() if name == "genarm" else scores
            assert sums == pytest.approx(want, abs=1e-3)
        for support in ("lm", "combined", "all"):
            assert decoder.generate(prompts[0], 4, Guidance(5, 1.0, 0.0, support))[0].tokens
    _check_transformers(folders, prompts, answers, expected, name)


def _check_transformers(folders: Any, prompts: Any, answers: Any, expected: Any, name: str) -> None:
    """The folder is an ordinary one of PEFT or transformers."""
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        for prompt, answer, want in zip(prompts, answers, expected, strict=True):
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(f"{text} {answer} <eos>", add_special_tokens=False, return_tensors="pt")[
                "input_ids"
            ]
            with torch.no_grad():
                logits = model(ids).logits[0, :-1]
            values = logits.log_softmax(-1) if name == "genarm" else logits
            picked = values.gather(-1, ids[0, 1:, None])[-len(want) :, 0]
            assert (picked.sum() if name == "genarm" else picked[-1]) == pytest.approx(want[-1], abs=1e-3)


def test_the_trunks_cache_changes_nothing(base: Path, tmp_path: Path) -> None:
    for name in ("farma", "genarm"):
        train(base, tmp_path / f"{name} cached", objective=name, fork_layer=2)
        train(base, tmp_path / f"{name} run", objective=name, fork_layer=2, cache_trunk=False)
        run = weights(tmp_path / f"{name} run")
        for key, weight in weights(tmp_path / f"{name} cached").items():
            torch.testing.assert_close(weight, run[key], rtol=1e-3, atol=1e-4)


def test_a_rewarded_token_is_what_guided_decoding_takes(base: Path, tmp_path: Path) -> None:
    """Chosen answers use four words alone; guided by either method, answers do so more often."""
    favoured = set(range(6, 10))
    for name in ("farma", "genarm"):
        train(base, tmp_path / name, data=rows(150), objective=name, num_train_epochs=6)
        decoder = RewardGuidedDecoder.from_pretrained(
            str(base), reward=named_guide(f"{name}:{tmp_path / name}")
        )
        prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows(20, seed=3)]
        shares = []
        for beta in (0.0, 4.0):
            guided = decoder.generate(prompts, 6, Guidance(beta=beta, support="all"), seed=5)
            tokens = [token for row in guided for token in row.tokens]
            shares.append(sum(token in favoured for token in tokens) / len(tokens))
        assert shares[1] > shares[0] + 0.1, name


def test_the_end_tokens_row_is_fitted_first(tmp_path: Path) -> None:
    pairs = tokenized(40)
    trainer = trainer_on(pairs, tmp_path, 1, 1, Objective("farma"))
    head = dict(trainer.model.named_parameters())["base_model.model.lm_head.modules_to_save.default.weight"]
    head.data.zero_()
    trainer.fit_head(0.1)
    assert head[EOS].any()
    assert not head[torch.arange(len(head)) != EOS].any()
    # What was fitted is the difference of the states before the last tokens.
    model: Any = make_lm()
    found = []
    with torch.no_grad():
        for pair in pairs:
            for answer in (pair.chosen_ids, pair.rejected_ids):
                hidden = model.base_model(torch.tensor([[*pair.prompt_ids, *answer[:-1]]])).last_hidden_state
                found.append(hidden[0, -1])
    features = torch.stack(found[::2]) - torch.stack(found[1::2])
    torch.testing.assert_close(head[EOS], fit(features, torch.ones(40), 0.1), rtol=1e-3, atol=1e-4)
    scores = trainer.score(trainer.train_pairs)
    assert sum(chosen[-1] > rejected[-1] for chosen, rejected in scores) > 0.8 * len(pairs)


def test_what_cannot_be_trained_is_refused(base: Path, tmp_path: Path) -> None:
    for settings, said in (
        ({"objective": "genarm", "fork_layer": 3}, "leaves no layer to adapt"),
        ({"objective": "genarm", "head_learning_rate": 0.1}, "genarm trains no head"),
        ({"objective": "genarm", "head_fit": 0.3}, "the objective is genarm"),
        ({"objective": "genarm", "beta_r": 0.0}, "beta_r=0.0 is not above 0"),
        ({"objective": "genarm", "beta_r": float("nan")}, "beta_r=nan is not above 0"),
    ):
        with pytest.raises(RGTGError, match=said):
            train(base, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()


def test_a_head_of_another_name_is_refused(base: Path) -> None:
    model: Any
    model, _ = load_causal(base, new_head=True)
    model.embed_out = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.embed_out
    with pytest.raises(RGTGError, match="calls its vocabulary head embed_out"):
        add_adapters(model, 0, Lora(), VOCABULARY_HEAD)


def test_an_answer_follows_its_prompt() -> None:
    """In a packed row, what stands before a rejected answer is the chosen one."""
    pairs = tokenized(5)
    batch = collate(pairs, [[0, 1, 2], [3, 4]], 0)
    rows_of, columns, before = preceding_positions(batch)
    again = answer_positions(batch)
    assert torch.equal(columns, again[1])
    ids = batch.input_ids[rows_of, before].tolist()
    want = [
        token
        for i in batch.pairs
        for answer in (pairs[i].chosen_ids, pairs[i].rejected_ids)
        for token in [pairs[i].prompt_ids[-1], *answer[:-1]]
    ]
    assert ids == want
