"""T-REG on TRL's DPOTrainer: without its regulariser it is TRL's DPO and SimPO, with it the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("trl", reason="policies are trained by trl")
pytest.importorskip("peft", reason="LoRA training needs peft")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from rgtg_fast.errors import RGTGError
from rgtg_fast.training.answer_scores import fill_reference
from rgtg_fast.training.data import TokenizedPair, load_pairs, tokenize_pairs
from rgtg_fast.training.model import Lora, lora_config
from rgtg_fast.training.packing import use_packed_attention
from rgtg_fast.training.policy.trainer import TRegTrainer, preference_dataset
from rgtg_fast.training.run import checkpointing
from rgtg_fast.training.t_reg import Templates, fill_token_rewards
from tests.conftest import make_lm, make_tokenizer
from tests.training.support import rows

TEMPLATES = Templates("w1 {question} w2 {answer} w3", "w1 {question} w2 {answer} w4")
# The answer follows after one space, which the tokenizer splits at: TRL's own texts give the same tokens.
TEXTS = [{name: f" {text}" if name != "prompt" else text for name, text in row.items()} for row in rows(24)]
BETA, MARGIN, ALPHA = 0.3, 0.7, 0.5


def arguments(folder: Path, **settings: Any) -> DPOConfig:
    return DPOConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            # Adam would make a whole step of a rounding error in a gradient near 0.
            "optim": "sgd",
            "learning_rate": 0.02,
            "beta": BETA,
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            **checkpointing(False),
            "max_length": None,
            **settings,
        }
    )


def tokenized() -> tuple[list[TokenizedPair], list[Any], Any]:
    tokenizer = make_tokenizer(None)
    sources, _ = load_pairs(TEXTS)
    return tokenize_pairs(sources, tokenizer, 64)[0], sources, tokenizer


def trainer(
    folder: Path, dtype: torch.dtype = torch.float32, lora: bool = True, **settings: Any
) -> TRegTrainer:
    model: Any = make_lm(dtype=dtype, num_hidden_layers=3)
    pairs, sources, tokenizer = tokenized()
    use_packed_attention(model)
    reference = fill_reference(folder / "numbers", model, pairs, budget=256)
    rewards = fill_token_rewards(folder / "numbers", model, tokenizer, pairs, sources, TEMPLATES, budget=256)
    model.set_attn_implementation("sdpa")
    config = lora_config(model, 1, Lora(rank=4), None) if lora else None
    args = arguments(folder / "run", **settings.pop("args", {}))
    return TRegTrainer(
        model,
        args,
        preference_dataset(pairs, reference, rewards),
        processing_class=tokenizer,
        peft_config=config,
        **settings,
    )


def losses(run: Any) -> list[float]:
    run.train()
    return [row["loss"] for row in run.state.log_history if "loss" in row]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_without_the_regulariser_it_is_trls_dpo(tmp_path: Path, lora: bool) -> None:
    """TRL's trainer tokenises the texts and runs the reference itself."""
    # In float32 the policies' rounding errors would differ by more after a few steps.
    wide = torch.float64
    ours = losses(trainer(tmp_path / "ours", wide, lora, alpha=0.0))
    model: Any = make_lm(dtype=wide, num_hidden_layers=3)
    reference: Any = make_lm(dtype=wide, num_hidden_layers=3)
    theirs = DPOTrainer(
        model,
        None if lora else reference,
        args=arguments(tmp_path / "theirs"),
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=make_tokenizer(None),
        peft_config=lora_config(model, 1, Lora(rank=4), None) if lora else None,
    )
    expected = losses(theirs)
    assert len(expected) == 4
    # The policy leaves the reference.
    assert max(abs(loss - expected[0]) for loss in expected) > 1e-3
    assert ours == pytest.approx(expected, abs=1e-6)


def naive_loss(policy: Any, reference: Any, run: TRegTrainer, alpha: float) -> torch.Tensor:
    """The published loss of the first four pairs, each answer in a forward of its own."""

    def logprobs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[
            0, len(prompt) - 1 : -1
        ]
        return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]

    simpo, total = run.form == "simpo", torch.zeros((), dtype=torch.float64)
    for i in range(4):
        row: Any = run.train_dataset[i]
        values, penalties = [], []
        for side in ("chosen", "rejected"):
            prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
            chosen = logprobs(policy, prompt, answer)
            with torch.no_grad():
                base = logprobs(reference, prompt, answer)
            scale = BETA / len(answer) if simpo else BETA
            values.append(scale * (chosen.sum() - (0 if simpo else base.sum())))
            penalties.append(-(scale * torch.tensor(row[f"{side}_token_rewards"]).double() * chosen).sum())
        margin = MARGIN if simpo else 0.0
        weight = torch.sigmoid(values[1] - values[0] + margin).detach()
        total = total - F.logsigmoid(values[0] - values[1] - margin) + alpha * weight * sum(penalties)
    return total / 4


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
@pytest.mark.parametrize("form", ["dpo", "simpo"])
def test_loss_and_gradient_are_the_formula(tmp_path: Path, form: str, alpha: float) -> None:
    run = trainer(tmp_path, torch.float64, lora=False, form=form, alpha=alpha, margin=MARGIN)
    model: Any = run.model
    reference = make_lm(dtype=torch.float64, num_hidden_layers=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])
    model.train()
    loss = run.compute_loss(model, batch)
    expected = naive_loss(model, reference, run, alpha)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-6)
    assert abs(loss.item() - naive_loss(model, reference, run, ALPHA - alpha).item()) > 1e-4
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, [p for _, p in named])
    theirs = torch.autograd.grad(expected, [p for _, p in named])
    for (name, _), a, b in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max() + 1e-3), msg=name)


def test_it_logs_its_numbers(tmp_path: Path) -> None:
    run = trainer(tmp_path, form="simpo", alpha=ALPHA, args={"max_steps": 2})
    run.train()
    row = next(row for row in run.state.log_history if "loss" in row)
    assert row["pairs_per_second"] > 0
    assert 0 < row["t_reg/weight"] < 1
    # Length-normalised rewards without a reference, not TRL's.
    assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-5)
    assert row["rewards/chosen"] < 0


def test_what_cannot_be(tmp_path: Path) -> None:
    for settings, message in (
        ({"alpha": float("nan")}, "alpha=nan is not a number from 0 up"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"margin": float("inf")}, "margin=inf"),
        ({"form": "ipo"}, "form='ipo' is unknown"),
        ({"args": {"loss_type": ["hinge"]}}, "T-REG regularizes DPO and SimPO"),
    ):
        with pytest.raises(RGTGError, match=message):
            trainer(tmp_path, **settings)
    pairs, _, tokenizer = tokenized()
    model: Any = make_lm()
    with pytest.raises(RGTGError, match="no column ref_chosen_logps"):
        TRegTrainer(model, arguments(tmp_path), preference_dataset(pairs), processing_class=tokenizer)
    with pytest.raises(RGTGError, match="no column chosen_token_rewards"):
        TRegTrainer(
            model, arguments(tmp_path), preference_dataset(pairs), processing_class=tokenizer, form="simpo"
        )


def test_a_loss_that_is_not_finite_names_the_rows(tmp_path: Path) -> None:
    run = trainer(tmp_path, alpha=ALPHA)
    model: Any = run.model
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(
        RGTGError, match=r"the loss became nan at step 1 with the pairs in rows .*no checkpoint yet"
    ):
        run.train()
