"""T-REG's token rewards against their formula, the file that keeps them, and the templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rgtg_fast.errors import RGTGError
from rgtg_fast.training import answer_scores
from rgtg_fast.training.answer_scores import fill_reference
from rgtg_fast.training.data import PreferencePair, load_pairs, tokenize_pairs
from rgtg_fast.training.packing import use_packed_attention
from rgtg_fast.training.t_reg import (
    TEMPLATES,
    Templates,
    adaptive_weight,
    contrast,
    fill_token_rewards,
    regularizer,
    token_rewards,
)
from tests.conftest import make_lm, make_tokenizer
from tests.training.support import rows

WORDS = Templates("w1 w2 {question} w3 {answer} w4 w5", "w1 w2 {question} w3 {answer} w6")
EOS = 1


def model(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    network = make_lm(dtype=dtype, **settings)
    use_packed_attention(network)
    return network


@torch.no_grad()
def naive_logprobs(network: Any, context: list[int], answer: list[int]) -> torch.Tensor:
    """log π(y_t | context, y_<t) by a forward of its own over the whole text."""
    logits = network(torch.tensor([[*context, *answer]]), use_cache=False).logits[0]
    logprobs = logits.log_softmax(-1)[len(context) - 1 : -1]
    return logprobs.gather(-1, torch.tensor(answer)[:, None])[:, 0]


def naive_rewards(network: Any, better: list[int], worse: list[int], answer: list[int]) -> torch.Tensor:
    difference = naive_logprobs(network, better, answer) - naive_logprobs(network, worse, answer)
    return torch.sigmoid(difference) - 0.5


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "templates",
    [
        WORDS,
        # Nothing in common, and one context that is the other's beginning.
        Templates("w1 {question} {answer}", "w2 {answer} {question}"),
        Templates("w1 {question} {answer}", "w1 {question} {answer} w9"),
    ],
    ids=["shared", "apart", "beginning"],
)
def test_rewards_are_the_formula(chat: bool, templates: Templates) -> None:
    network, tokenizer = model(), make_tokenizer() if chat else make_tokenizer(None)
    prompts, answers = ["w10 w11", "w12", "w13 w14 w15"], ["w20 w21", "w22", "w23 w24 w25 w26"]
    ids = [[*tokenizer(answer)["input_ids"], EOS] for answer in answers]
    found = token_rewards(network, tokenizer, prompts, answers, ids, templates, budget=64)
    for prompt, answer, tokens, rewards in zip(prompts, answers, ids, found, strict=True):
        contexts = []
        for text in (templates.better, templates.worse):
            filled = text.replace("{question}", prompt).replace("{answer}", answer)
            contexts.append(tokenizer(f"<user> {filled} <assistant>" if chat else filled)["input_ids"])
        expected = naive_rewards(network, *contexts, tokens)
        assert rewards.shape == (len(tokens),)
        assert rewards.abs().max() <= 0.5
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-12)


def test_what_the_contexts_share_runs_once() -> None:
    tokenizer = make_tokenizer()
    pair = contrast("w10 w11", "w20 w21", [26, 27, EOS], tokenizer, WORDS)
    # <user> w1 w2 w10 w11 w3 w20 w21 are in both contexts.
    assert len(pair.prompt_ids) == 8
    assert pair.chosen_ids[-3:] == pair.rejected_ids[-3:] == [26, 27, EOS]
    assert len(pair.chosen_ids) == len(pair.rejected_ids) + 1


def test_dialogues_become_the_question_and_system_messages_stay() -> None:
    messages = [
        {"role": "system", "content": "w50"},
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3 {answer}"},
    ]
    better, worse = WORDS.prompts(messages, "w4 {question}", chat=True)
    assert better.messages is not None
    assert worse.messages is not None
    assert better.messages[0] == worse.messages[0] == messages[0]
    asked = better.messages[1]["content"]
    # Braces in the texts themselves are left alone.
    assert asked == "w1 w2 User: w1\n\nAssistant: w2\n\nUser: w3 {answer} w3 w4 {question} w4 w5"


def test_the_projects_templates_ask_for_better_and_worse_at_the_end() -> None:
    ours = Templates.load()
    better, worse = (t.replace("{question}", "").replace("{answer}", "") for t in (ours.better, ours.worse))
    for word in ("helpful", "correct", "coherent", "concise"):
        assert word in better
    for word in ("unhelpful", "incorrect", "incoherent", "verbose"):
        assert word in worse
    start = next(i for i, (a, b) in enumerate(zip(ours.better, ours.worse, strict=False)) if a != b)
    assert ours.better.index("{answer}") < start


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("better: '{question} {answer}'\nworse: '{question}'", r"'worse' has no \{answer\}"),
        ("better: '{answer}'\nworse: '{question} {answer}'", r"'better' has no \{question\}"),
        ("better: '{question} {answer} {style}'\nworse: '{question} {answer}'", r"has \{style\}"),
        ("better: '{question} {answer}'\nworse: '{question} {answer}'", "the same text"),
        ("better: 3\nworse: '{question} {answer}'", "'better' is int"),
        ("better: '{question} {answer}'", "not the two texts"),
        ("- one\n- two", "not the two texts"),
        ("better: [", "not YAML"),
    ],
)
def test_templates_that_cannot_be(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text(content)
    with pytest.raises(RGTGError, match=message) as error:
        Templates.load(path)
    assert "\n" not in str(error.value)


def test_own_templates(tmp_path: Path) -> None:
    with pytest.raises(RGTGError, match="cannot read the templates"):
        Templates.load(tmp_path / "none.yaml")
    path = tmp_path / "own.yaml"
    path.write_text(TEMPLATES.read_text(encoding="utf-8").replace("must be worse", "must be terrible"))
    assert "terrible" in Templates.load(path).worse


def test_a_text_over_the_context() -> None:
    network, tokenizer = model(max_position_embeddings=14), make_tokenizer()
    with pytest.raises(RGTGError, match="takes 15 tokens in its contrastive template and the model holds 14"):
        token_rewards(network, tokenizer, ["w1"], ["w2 w3 w4"], [[8, 9, 10, EOS]], WORDS)


def test_nan_rewards_are_an_error() -> None:
    network, tokenizer = model(), make_tokenizer()
    with torch.no_grad():
        network.model.norm.weight[0] = float("nan")
    with pytest.raises(RGTGError, match="a token reward of row 0 is NaN"):
        token_rewards(network, tokenizer, ["w1"], ["w2"], [[8, EOS]], WORDS)


# ---- The file


def data(count: int = 12) -> tuple[list[Any], list[PreferencePair], Any]:
    tokenizer = make_tokenizer()
    pairs, _ = load_pairs(rows(count))
    return tokenize_pairs(pairs, tokenizer, 64)[0], pairs, tokenizer


def fill(folder: Path, network: Any, templates: Templates = WORDS) -> Any:
    pairs, sources, tokenizer = data()
    return fill_token_rewards(folder, network, tokenizer, pairs, sources, templates, budget=128)


def forwards(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Counts the packed forwards, and breaks the run after some of them."""
    counted: list[int] = []
    run = answer_scores.packed_hidden

    def counting(*args: Any) -> torch.Tensor:
        if stop_after is not None and len(counted) == stop_after:
            raise KeyboardInterrupt
        counted.append(1)
        return run(*args)

    monkeypatch.setattr(answer_scores, "packed_hidden", counting)
    return counted


def test_the_file_has_every_answers_rewards_and_is_filled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = model(torch.float32)
    counted = forwards(monkeypatch)
    file = fill(tmp_path, network)
    assert counted
    pairs, sources, tokenizer = data()
    for i, (pair, source) in enumerate(zip(pairs, sources, strict=True)):
        expected = token_rewards(
            network,
            tokenizer,
            [source.prompt] * 2,
            [source.chosen, source.rejected],
            [pair.chosen_ids, pair.rejected_ids],
            WORDS,
        )
        for numbers, rewards in zip(file[i], expected, strict=True):
            np.testing.assert_allclose(numbers, rewards, atol=2e-6)
    counted.clear()
    again = fill(tmp_path, network)
    assert not counted
    assert all(np.array_equal(a, b) for i in range(12) for a, b in zip(file[i], again[i], strict=True))


def test_what_the_numbers_depend_on_names_the_file(tmp_path: Path) -> None:
    network = model(torch.float32)
    paths = {fill(tmp_path, network).path, fill(tmp_path, network).path}
    paths.add(fill(tmp_path, network, Templates(WORDS.better, WORDS.worse + " w7")).path)
    paths.add(fill(tmp_path, model(torch.float32, seed=5)).path)
    with torch.no_grad():
        network.lm_head.weight += 1
    paths.add(fill(tmp_path, network).path)
    assert len(paths) == 4


def test_a_broken_computation_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = model(torch.float32)
    whole = fill(tmp_path / "whole", network)
    with monkeypatch.context() as patched:
        counted = forwards(patched, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path / "broken", network)
        assert len(counted) == 2
    with monkeypatch.context() as patched:
        counted = forwards(patched)
        resumed = fill(tmp_path / "broken", network)
        rest = len(counted)
    with monkeypatch.context() as patched:
        counted = forwards(patched)
        fill(tmp_path / "other", network)
        assert len(counted) == rest + 2
    for i in range(12):
        for a, b in zip(whole[i], resumed[i], strict=True):
            assert np.array_equal(a, b)


def test_reference_log_probabilities_are_those_of_forwards_alone(tmp_path: Path) -> None:
    network = model(torch.float32)
    pairs, _, _ = data()
    file = fill_reference(tmp_path, network, pairs, budget=128)
    for i, pair in enumerate(pairs):
        for numbers, ids in zip(file[i], (pair.chosen_ids, pair.rejected_ids), strict=True):
            np.testing.assert_allclose(numbers, naive_logprobs(network, pair.prompt_ids, ids), atol=1e-5)


# ---- The regularizer


def test_the_regularizers_gradient() -> None:
    torch.manual_seed(0)
    logprobs = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    rewards = torch.rand(4, 7, dtype=torch.float64) - 0.5
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: regularizer(x, rewards, scale), logprobs)
    (slopes,) = torch.autograd.grad(regularizer(logprobs, rewards, scale).sum(), logprobs)
    torch.testing.assert_close(slopes, -scale[:, None] * rewards, rtol=0, atol=1e-15)


def test_the_weight_is_large_where_the_policy_is_wrong_and_has_no_gradient() -> None:
    chosen = torch.tensor([3.0, -3.0], dtype=torch.float64, requires_grad=True)
    weight = adaptive_weight(chosen, torch.zeros(2, dtype=torch.float64))
    assert not weight.requires_grad
    torch.testing.assert_close(weight, torch.sigmoid(torch.tensor([-3.0, 3.0], dtype=torch.float64)))
    torch.testing.assert_close(
        adaptive_weight(chosen, torch.zeros(2, dtype=torch.float64), margin=1.0),
        torch.sigmoid(1 - chosen.detach()),
    )
