"""Stop strings and streams, letter by letter: special tokens, borders of tokens, characters of several bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from rgtg_fast import BestOfN, Blocks, Guidance, RewardGuidedDecoder, SequenceReward
from rgtg_fast.engine.outputs import GeneratedRow
from rgtg_fast.engine.stopping import before_stop, shown_text
from rgtg_fast.models.language_model import LanguageModel
from tests.conftest import make_lm, make_rm

PIECES = ["a", "b", "é", "🙂", "<|end|>", "<|x|>", "|", "<|", " "]


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """A token for each byte, and special tokens."""
    alphabet = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    made = Tokenizer(BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", additional_special_tokens=["<|end|>", "<|x|>"]
    )


class Speller:
    """A decoder whose answer to any prompt is a given text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer, self.target = tokenizer, list[int]()
        lm = make_lm(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        self.decoder = RewardGuidedDecoder.from_pretrained((lm, tokenizer), reward=self._reward)
        self.guidance = Guidance(k=len(tokenizer), beta=1, temperature=0)

    def _reward(self, prefixes: list[torch.Tensor], candidates: torch.Tensor) -> torch.Tensor:
        rest = [*self.target, self.tokenizer.eos_token_id]
        wanted = torch.tensor([[rest[len(prefix) - 1]] for prefix in prefixes])
        return (candidates == wanted).float() * 1e4

    def row(self, target: list[int], stop: list[str], tokens: int = 60) -> GeneratedRow:
        """The answer, which a stream gives in the same pieces."""
        self.target = target
        row = self.decoder.generate("x", tokens, self.guidance, stop=stop)[0]
        pieces = list(self.decoder.stream("x", tokens, self.guidance, stop=stop))
        assert "".join(piece.text for piece in pieces) == row.text
        assert pieces[-1].finish_reason == row.finish_reason
        return row


@pytest.fixture(scope="module")
def spell(letters: PreTrainedTokenizerFast) -> Callable[..., GeneratedRow]:
    return Speller(letters).row


def _before(tokenizer: PreTrainedTokenizerFast, tokens: list[int], at: int) -> str:
    """The first `at` characters of the text with special tokens, those left out: run by run."""
    shown, place, run = "", 0, list[int]()
    for token in [*tokens, None]:
        if token is not None and token not in tokenizer.all_special_ids:
            run.append(token)
            continue
        text = tokenizer.decode(run)
        shown += text[: max(0, at - place)]
        place += len(text) + (0 if token is None else len(tokenizer.decode([token])))
        run = []
    return shown


def _answers() -> Iterator[tuple[str, list[str], int]]:
    """A text, stop strings, and how many of its last bytes are missing."""
    yield "ok<|end|>and on", ["<|end|>"], 0
    yield "ok<|end|>and on", ["end|>an"], 0
    yield "ok<|x|>a<|end|>b", ["x|>a<|e"], 0
    yield "ok<|x|>a<|end|>b", ["kb", "ab"], 0
    yield "ok 🙂", ["🙂"], 0
    yield "ok 🙂", ["x"], 2


def _random_answers() -> Iterator[tuple[str, list[str], int]]:
    rng = random.Random(0)
    for _ in range(60):
        text, one, two = ("".join(rng.choices(PIECES, k=rng.randrange(1, n))) for n in (9, 3, 4))
        yield text, [one, two], rng.randrange(2)


def _right(letters: PreTrainedTokenizerFast, target: list[int], stops: list[str]) -> tuple[int, str] | None:
    """Tokens until transformers stops, and the text before the earliest stop string; None where it does not stop."""
    stops_at = StopStringCriteria(letters, stops)
    for n in range(1, len(target) + 1):
        if stops_at(torch.tensor([target[:n]]), None)[0]:
            full = letters.decode(target[:n])
            return n, _before(letters, target[:n], min(full.find(stop) for stop in stops if stop in full))
    return None


def test_answers_stop_where_transformers_stops(
    letters: PreTrainedTokenizerFast, spell: Callable[..., GeneratedRow]
) -> None:
    for text, stops, missing in _answers():
        target = letters(text, add_special_tokens=False)["input_ids"]
        target = target[: len(target) - missing]
        row, right = spell(target, stops), _right(letters, target, stops)
        whole = len(target), letters.decode(target, skip_special_tokens=True)
        assert (len(row.tokens), row.text) == (right or whole)
        assert row.finish_reason == ("eos" if right is None else "stop")


def test_any_text_stops_where_transformers_stops(letters: PreTrainedTokenizerFast) -> None:
    lm, stopped = LanguageModel(cast("Any", None), letters, len(letters)), 0
    for text, stops, missing in _random_answers():
        target = letters(text, add_special_tokens=False)["input_ids"]
        target = target[: len(target) - missing]
        right, shown = _right(letters, target, stops), ""
        for n in range(1, len(target) + 1):
            before = before_stop(lm, target[:n], stops)
            assert before == (right[1] if right is not None and n == right[0] else None)
            if before is not None:
                stopped += 1
                assert before.startswith(shown)
                break
            # What a stream has shown stays, and is never more than what a stop string will leave.
            now = shown_text(lm, target[:n], stops)
            assert now.startswith(shown) or shown.startswith(now)
            shown = max(shown, now, key=len)
    assert stopped > 20


def test_a_stream_holds_back_what_a_stop_string_may_begin_with(letters: PreTrainedTokenizerFast) -> None:
    speller = Speller(letters)
    speller.target = letters("ok🙂a<|x|>b.", add_special_tokens=False)["input_ids"]
    pieces = speller.decoder.stream("x", 60, speller.guidance, stop=["🙂a<|x|>c", "<|x|>b."])
    assert [piece.text for piece in pieces if piece.text] == ["o", "k", "🙂a"]


def test_a_text_cut_within_a_character_shows_it_as_incomplete(
    letters: PreTrainedTokenizerFast, spell: Callable[..., GeneratedRow]
) -> None:
    row = spell(letters("ok🙂", add_special_tokens=False)["input_ids"], ["never"], 4)
    assert (row.text, row.finish_reason) == ("ok\N{REPLACEMENT CHARACTER}", "length")


@pytest.mark.parametrize("strategy", [BestOfN(2), Blocks(2, 3)], ids=["best of n", "blocks"])
def test_strategies_stop_at_special_tokens(letters: PreTrainedTokenizerFast, strategy: object) -> None:
    size = len(letters)
    lm, rm = make_lm(vocab_size=size, eos_token_id=256), make_rm(vocab_size=size, eos_token_id=256)
    with torch.no_grad():  # "<|end|>" is by far the most probable token
        lm.lm_head.weight[:] = 0
        lm.lm_head.weight[257] = 1e3 * lm.model(torch.tensor([[5]])).last_hidden_state[0, 0]
    decoder = RewardGuidedDecoder.from_pretrained((lm, letters), reward=SequenceReward((rm, letters)))
    row = decoder.generate([[5]], 8, stop="<|end|>", strategy=strategy)[0]
    assert (row.text, row.finish_reason, row.tokens) == ("", "stop", [257])
