"""What people pass by mistake: an answer, or one line that names the value and says what to pass."""

from __future__ import annotations

import decimal
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rgtg_fast import (
    BestOfN,
    Blocks,
    Guidance,
    RewardGuidedDecoder,
    RewardNaNError,
    RGTGError,
    Segments,
    SequenceReward,
    TextReward,
    VocabularyReward,
)
from rgtg_fast.errors import shown
from tests.conftest import make_lm, make_rm, make_tokenizer

GREEDY = Guidance(k=8, beta=1.0, temperature=0)
T, LM, RM = make_tokenizer(), make_lm(), make_rm()


def load(lm: Any = (LM, T), **settings: Any) -> RewardGuidedDecoder:
    return RewardGuidedDecoder.from_pretrained(lm, **settings)


@pytest.fixture(scope="module")
def decoder() -> RewardGuidedDecoder:
    return load(reward=SequenceReward((RM, T)))


def refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(RGTGError) as caught:
        call()
    message = str(caught.value)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lm": LM}, "the language model is a LlamaForCausalLM alone: pass (model, tokenizer)"),
        ({"lm": (T, LM)}, "a transformers model first"),
        ({"lm": (LM, T, 1)}, "pass a path, a hub id or (model, tokenizer)"),
        ({"lm": (LM, "name")}, "tokenizer is 'name'"),
        ({"lm": None}, "the language model is None"),
        ({"lm": ""}, "empty name"),
        ({"reward": RM}, "the reward is a LlamaForSequenceClassification alone: pass (model, tokenizer)"),
        ({"reward": SequenceReward}, "the reward is the class SequenceReward"),
        ({"reward": T}, "pass (model, tokenizer)"),
        ({"reward": 5}, "reward=5 is not callable"),
        ({"reward": SequenceReward(RM)}, "the reward model is a LlamaForSequenceClassification alone"),  # pyright: ignore[reportArgumentType]
        ({"reward": VocabularyReward(LM)}, "the reward model is a LlamaForCausalLM alone"),  # pyright: ignore[reportArgumentType]
        ({"reward": (LM, T)}, "has 2 labels"),
        ({"max_length": "64"}, "max_length='64' is not a whole number"),
        ({"max_length": 64.0}, "max_length=64.0 is not a whole number"),
        ({"max_batch": "8"}, "max_batch='8' is not a whole number"),
        ({"device": "meta"}, "device='meta' is not served: use 'cpu' or 'cuda'"),
        ({"device": "mps"}, "device='mps' is not served: use 'cpu' or 'cuda'"),
        ({"device": "xpu"}, "device='xpu' is not served: use 'cpu' or 'cuda'"),
        ({"device": []}, "device=[] is unknown"),
        ({"dtype": ["float32"]}, "dtype=['float32'] is unknown"),
        ({"engine": ["native"]}, "engine=['native'] is unknown"),
        ({"compile": "fast"}, "compile='fast'"),
    ],
)
def test_what_is_no_model_reward_or_setting(settings: dict[str, Any], words: str) -> None:
    refused(lambda: load(**settings), words)


def test_pairs_and_numbers_of_other_libraries_are_taken(decoder: RewardGuidedDecoder) -> None:
    right = decoder.generate("w1", 3, GREEDY)[0].tokens
    taken = load([LM, T], reward=(RM, T), max_batch=np.int64(2), max_length=np.int64(64))
    assert (taken.max_batch, taken.max_length) == (2, 64)
    other = Guidance(k=np.int64(8), beta=np.float32(1), temperature=torch.tensor(0))  # pyright: ignore[reportArgumentType]
    assert taken.generate("w1", np.int32(3), other, seed=np.int64(3))[0].tokens == right  # pyright: ignore[reportArgumentType]
    assert len(taken.generate(["w1", "w2"], 1, GREEDY, seed=np.arange(2))) == 2  # pyright: ignore[reportArgumentType]
    assert taken.score("w1", torch.tensor([[3, 4]])) == taken.score("w1", [(3, 4)])  # pyright: ignore[reportArgumentType]
    assert Guidance(weights=np.array([0.5, 0.25])).weights == (0.5, 0.25)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 1e39}, "beta=1e+39 is beyond float32"),
        ({"beta": -(10**400)}, "is not finite"),
        ({"beta": float("nan")}, "beta=nan is not finite"),
        ({"beta": True}, "beta=True is not a number"),
        ({"beta": "2"}, "beta='2' is not a number"),
        ({"beta": decimal.Decimal(1)}, "is not a number"),
        ({"beta": torch.ones(3, 3)}, "beta=an object of class Tensor is not a number"),
        ({"temperature": 1e39}, "temperature=1e+39 is beyond float32"),
        ({"temperature": float("inf")}, "temperature=inf is not finite"),
        ({"gate_entropy": 1e300}, "gate_entropy=1e+300 is beyond float32"),
        ({"weights": (1e39,)}, "weights[0]=1e+39 is beyond float32"),
        ({"weights": 3}, "weights=3 is not a list"),
        ({"k": 3.0}, "k=3.0 is not a whole number"),
        ({"k": np.bool_(True)}, "is not a whole number"),
        ({"support": ["lm"]}, "support=['lm'] is unknown"),
    ],
)
def test_settings_of_the_guidance(settings: dict[str, Any], words: str) -> None:
    refused(lambda: Guidance(**settings), words)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: d.generate(None), "the prompt is None"),
        (lambda d: d.generate(5), "the prompt is 5"),
        (lambda d: d.generate([[1, 64]], 2), "token id 64, outside the vocabulary (V=64)"),
        (lambda d: d.generate([[-1]], 2), "token id -1"),
        (lambda d: d.generate("w1", 3.0), "max_new_tokens=3.0"),
        (lambda d: d.generate("w1", 10**30), "new ones exceed its 128"),
        (lambda d: d.generate("w1", 2, None), "guidance=None is not a Guidance"),
        (lambda d: d.generate("w1", 2, seed=2**63), "not a 64-bit whole number"),
        (lambda d: d.generate("w1", 2, seed=True), "seed=True"),
        (lambda d: d.generate("w1", 2, seed=None), "seed=None"),
        (lambda d: d.generate("w1", 2, stop=5), "stop=5 is not a valid stop string"),
        (lambda d: d.generate("w1", 2, strategy=5), "strategy=5 is not a strategy"),
        (lambda d: d.generate("w1", 2, Guidance(k=10**30)), "exceeds the vocabulary"),
        (lambda d: d.score("w1", None), "answer 0 is None"),
        (lambda d: d.score(["w1", "w2"], [5, 6]), "1 answers for 2 prompts"),
        (lambda d: d.score("w1", [[64]]), "answer 0 has token id 64, outside the vocabulary"),
        (lambda d: d.score("w1", [[1.5]]), "answer 0 is [1.5]"),
        (lambda d: d.score("w1", [[[3]]]), "answer 0 is [[3]]"),
    ],
)
def test_arguments_of_a_call(decoder: RewardGuidedDecoder, call: Callable[[Any], Any], words: str) -> None:
    refused(lambda: call(decoder), words)


def test_a_broken_template_is_one_line() -> None:
    broken = load(reward=SequenceReward((RM, T), chat_template="{% for m in %}"))
    refused(lambda: broken.generate([{"role": "user", "content": "w1"}], 3), "the chat template")


def test_ids_outside_the_guides_own_embedding_are_refused_before_a_forward() -> None:
    """Its prompts are tokenised on their own, and a tokenizer may have more tokens than its model has rows."""
    own = make_tokenizer()
    own.add_tokens(["w99"])
    guided = load(reward=SequenceReward((RM, own), chat_template="w99"), engine="transformers")
    refused(
        lambda: guided.generate([{"role": "user", "content": "w1"}], 3),
        "prompt 0 for the reward model has token id 64, outside the vocabulary (V=64): use the model's own tokenizer",
    )


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda p, c: None, "returned None, which is not an array of numbers"),
        (lambda p, c: "x", "returned 'x'"),
        (lambda p, c: [[1.0, 2.0]], "returned shape (1, 2) for candidates of shape (1, 8)"),
        (lambda p, c: c + 1j, "complex64"),
        (lambda p, c: (-c.float()).to_sparse(), "dense"),
        (lambda p, c: torch.zeros(c.shape, device="meta"), "not an array of numbers"),
        (lambda p, c: torch.full(c.shape, torch.nan), "is NaN"),
    ],
)
def test_functions_that_return_no_rewards(function: Any, words: str) -> None:
    refused(lambda: load(reward=function).generate("w1", 2, GREEDY), words)
    if "shape" not in words and "NaN" not in words:
        text = load(reward=TextReward(lambda prompts, answers: function(None, torch.zeros(len(answers)))))
        refused(lambda: text.generate("w1", 2, GREEDY), words.replace("complex64", "dense"))


@pytest.mark.parametrize(
    "function",
    [
        lambda p, c: -c,
        lambda p, c: -c.double(),
        lambda p, c: -c.half(),
        lambda p, c: -c.float() * torch.ones(1, requires_grad=True),
        lambda p, c: (-c.numpy()).tolist(),
        lambda p, c: [-row for row in c],
        lambda p, c: (-c.clone(), c.zero_(), [prefix.zero_() for prefix in p])[0],
    ],
)
def test_rewards_of_any_real_kind(function: Any) -> None:
    right = load(reward=lambda p, c: -c.float()).generate("w1 w2", 4, GREEDY)[0].tokens
    assert load(reward=function).generate("w1 w2", 4, GREEDY)[0].tokens == right


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (BestOfN(n=10**12), "n=1000000000000 answers per prompt need"),
        (Blocks(k=10**12), "k="),
    ],
)
def test_wishes_without_bounds_are_refused_with_what_would_fit(
    decoder: RewardGuidedDecoder, strategy: Any, words: str
) -> None:
    refused(lambda: decoder.generate("w1", 2, strategy=strategy), words)
    refused(lambda: decoder.generate("w1", 2, strategy=strategy), "would fit")


def test_more_candidates_than_memory_for_a_step_are_refused(
    decoder: RewardGuidedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rgtg_fast.models.runner.ModelRunner.step_bytes_per_token", property(lambda self: 2**40)
    )
    refused(lambda: decoder.generate("w1", 2, GREEDY), "scoring k=8 candidates of 1 rows needs 8192.00 GiB")


def test_large_settings_that_cost_nothing_are_taken(decoder: RewardGuidedDecoder) -> None:
    right = decoder.generate("w1", 4, GREEDY)[0].tokens
    wide = load(reward=SequenceReward((RM, T)), max_batch=10**12)
    assert wide.generate("w1", 4, GREEDY)[0].tokens == right
    blocks = decoder.generate("w1", 4, strategy=Blocks(length=4))
    assert decoder.generate("w1", 4, strategy=Blocks(length=10**9))[0].tokens == blocks[0].tokens
    assert decoder.generate("w1", 4, strategy=Segments(max_tokens=10**9, min_tokens=10**9))[0].tokens
    ignored = Guidance(k=10**30, support="all", temperature=0)
    assert (
        load().generate("w1", 4, ignored)[0].tokens
        == load().generate("w1", 4, Guidance(temperature=0))[0].tokens
    )
    padded = load(max_batch=10**12, pad_batch=True)
    refused(lambda: padded.generate("w1", 4, GREEDY), "would fit")


def test_errors_are_one_line_and_go_to_other_processes() -> None:
    assert str(RGTGError("one\ntwo")) == "one two"
    assert shown(LM) == "an object of class LlamaForCausalLM"
    assert shown("x" * 100, 20) == "'" + "x" * 16 + "..."
    assert shown(10**5000) == "an object of class int"
    error = pickle.loads(pickle.dumps(RewardNaNError(1, 2, 3, "text", ["row"])))
    assert (error.row, error.step, error.token, error.finished) == (1, 2, 3, ["row"])
    assert str(error) == str(RewardNaNError(1, 2, 3, "text"))
