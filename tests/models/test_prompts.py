"""Every form of a prompt is read as meant, or refused in one line."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rgtg_fast import ContrastiveReward, RewardGuidedDecoder, RGTGError, SequenceReward
from rgtg_fast.models.prompts import Prompt, as_answers, as_prompts, text_ids
from tests.conftest import CHAT_TEMPLATE, make_lm, make_rm, make_tokenizer

TOKENIZER = make_tokenizer()
IDS = [7, 8]  # of "w1 w2"
CHAT = [{"role": "user", "content": "w1 w2"}]
TABLE = Dataset.from_list([{"prompt": "w1", "messages": CHAT}, {"prompt": "w2", "messages": CHAT}])
NO_SYSTEM = CHAT_TEMPLATE.replace(
    "<{{", "{% if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}<{{", 1
)
PARTS_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message.content }}", "{% for part in message.content %}{{ part.text }} {% endfor %}"
)


def framed(single: str, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer that adds special tokens around a text, `$A`."""
    tokenizer = make_tokenizer()
    tokens = [("<eos>", 1), ("w50", 56), ("w51", 57)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    return tokenizer


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("w1 w2", [IDS]),
        (["w1", "w2"], [[7], [8]]),
        (tuple(IDS), [IDS]),
        (range(7, 9), [IDS]),
        (np.array(IDS), [IDS]),
        ([np.int64(7), np.int32(8)], [IDS]),
        (np.array([IDS, IDS[::-1]]), [IDS, IDS[::-1]]),
        (torch.tensor(IDS, dtype=torch.int32), [IDS]),
        (torch.tensor([IDS]), [IDS]),
        (list(torch.tensor(IDS)), [IDS]),
        ([torch.tensor(IDS), torch.tensor([9])], [IDS, [9]]),
        (TOKENIZER(["w1 w2", "w3"])["input_ids"], [IDS, [9]]),
        (TOKENIZER("w1 w2", return_tensors="pt")["input_ids"], [IDS]),
        (np.array(["w1", "w2"]), [[7], [8]]),
        (pd.Series(["w1", "w2"]), [[7], [8]]),
        (TABLE["prompt"], [[7], [8]]),
        pytest.param((text for text in ("w1", "w2")), [[7], [8]], id="generator"),
        (CHAT, [[3, 7, 8, 4]]),
        (tuple(CHAT), [[3, 7, 8, 4]]),
        ([collections.UserDict(CHAT[0])], [[3, 7, 8, 4]]),
        (TABLE["messages"], [[3, 7, 8, 4]] * 2),
        ([CHAT, "w1", IDS], [[3, 7, 8, 4], [7], IDS]),
    ],
    ids=str,
)
def test_shapes_of_prompts(given: Any, read: list[list[int]]) -> None:
    assert [prompt.ids(TOKENIZER) for prompt in as_prompts(given, TOKENIZER)] == read


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (TOKENIZER("w1 w2"), "a tokenizer's mapping: pass its input_ids"),
        ([TOKENIZER("w1 w2")], "prompt 0 is a tokenizer's mapping"),
        (TOKENIZER.apply_chat_template(CHAT), "a tokenizer's mapping"),
        (CHAT[0], "one chat message and a chat is a list of messages"),
        ([CHAT[0], "w1"], "one chat message"),
        ([{"prompt": "w1"}, {"prompt": "w2"}], "prompt 0 is a mapping with the keys prompt"),
        ([{"from": "human", "value": "w1"}], "a mapping with the keys from, value"),
        (TABLE, "a table"),
        (pd.DataFrame({"prompt": ["w1"]}), "a table"),
        (b"ab", "bytes: pass a string"),
        ([bytearray(b"ab")], "prompt 0 is bytes"),
        (None, "the prompt is None"),
        ([None], "prompt 0 is None"),
        (5, "the prompt is 5: pass"),
        ({"w1"}, "the prompt is {'w1'}"),
        ([True, False], "prompt 0 is True"),
        (torch.tensor([True, False]), "prompt 0 is True"),
        (torch.tensor([1.0]), "prompt 0 is 1.0"),
        (torch.tensor(5), r"the prompt is tensor\(5\)"),
        ([torch.tensor([IDS])], "a list of list"),
        ([[CHAT]], "a list of list"),
        ([7, "w1"], "prompt 0 is 7: pass"),
        ([], "there is no prompt"),
        (["w1", ""], "prompt 1 is empty"),
        ([[7], []], "prompt 1 is empty"),
    ],
    ids=str,
)
def test_values_that_are_no_prompt(given: Any, message: str) -> None:
    with pytest.raises(RGTGError, match=message) as raised:
        as_prompts(given, TOKENIZER)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_padded_rows_are_refused(side: str, kind: str | None) -> None:
    tokenizer = make_tokenizer()
    rows = tokenizer(["w1 w2", "w3"], padding=True, padding_side=side, return_tensors=kind)["input_ids"]
    with pytest.raises(RGTGError, match="prompt 1 is padded with token 0"):
        as_prompts(rows, tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    rows = tokenizer(["w1 w2", "w3"], padding=True, padding_side=side, return_tensors=kind)["input_ids"]
    with pytest.raises(RGTGError, match="prompt 1 is padded with token 1"):
        as_prompts(rows, tokenizer)
    assert len(as_prompts([[1, 7], [1, 8]], tokenizer)) == 2  # all begin with it: a beginning of text


@pytest.mark.parametrize(
    ("template", "message", "refusal"),
    [
        (NO_SYSTEM, {"role": "system", "content": "w1"}, "does not take .no system role."),
        (CHAT_TEMPLATE.replace("}} {%", "+ 1 }} {%"), CHAT[0], "does not take"),
        ("{% for", CHAT[0], "does not take"),
        (CHAT_TEMPLATE, {"role": "user"}, "message 0 of prompt 0 has content=None"),
        (CHAT_TEMPLATE, {"role": "user", "content": 5}, "has content=5"),
        (CHAT_TEMPLATE, {"content": "w1"}, "message 0 of prompt 0 has no role"),
        (CHAT_TEMPLATE, {"role": "user", "content": [{"type": "image", "url": "x"}]}, "pass a string"),
        (CHAT_TEMPLATE, {"role": "user", "content": [{"type": "text", "text": "w1"}]}, "content in parts"),
        ("{{ 'w1' }}", {"role": "user", "content": [{"type": "text", "text": "w2"}]}, "content in parts"),
    ],
)
def test_chats_that_a_template_refuses(template: str, message: dict[str, Any], refusal: str) -> None:
    with pytest.raises(RGTGError, match=refusal) as raised:
        Prompt([message]).ids(TOKENIZER, template)
    assert "\n" not in str(raised.value)


def test_content_in_parts_with_a_template_for_parts() -> None:
    parts = [{"type": "text", "text": "w1"}, {"type": "text", "text": "w2"}]
    assert Prompt([{"role": "user", "content": parts}]).ids(TOKENIZER, PARTS_TEMPLATE) == [3, 7, 8, 4]


def test_an_invalid_prompt_is_refused_before_decoding() -> None:
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer(NO_SYSTEM)))
    system = [{"role": "system", "content": "w2"}, *CHAT]
    for bad, message in (
        (system, "no system role"),
        ("w1 \ud83d", r"half of a surrogate pair, '\\ud83d', at character 3"),
        ([7, 64], "token id 64, outside the vocabulary .V=64."),
    ):
        with pytest.raises(RGTGError, match=f"^prompt 1 .*{message}"):
            decoder.iterate(["w1", bad], 2)
    contrastive = RewardGuidedDecoder.from_pretrained(
        (make_lm(), make_tokenizer(NO_SYSTEM)), reward=ContrastiveReward()
    )
    with pytest.raises(RGTGError, match="ContrastiveReward gives its instructions as system messages"):
        contrastive.generate([CHAT], 2)


@pytest.mark.parametrize("single", ["$A <eos>", "$A <eos> w51"])
def test_an_end_of_text_that_the_tokenizer_appends_is_left_out(single: str) -> None:
    plain, ending = make_tokenizer(), framed(single)
    expected = RewardGuidedDecoder.from_pretrained(
        (make_lm(), plain), reward=SequenceReward((make_rm(), plain))
    ).generate("w1 w2", 5)[0]
    for base, own in ((ending, plain), (plain, ending), (ending, ending)):
        decoder = RewardGuidedDecoder.from_pretrained(
            (make_lm(), base), reward=SequenceReward((make_rm(), own))
        )
        row = decoder.generate("w1 w2", 5)[0]
        assert (row.tokens, row.rewards) == (expected.tokens, expected.rewards)
        assert decoder.score("w1 w2", [row.tokens])[0] == pytest.approx(row.rewards, abs=1e-5)


def test_special_tokens_around_a_text() -> None:
    framing = framed("w50 $A <eos>", bos_token="w50")
    assert text_ids(framing, "w1 <eos>", "x", special=True) == [56, 7, 1]  # the text's own end is text
    assert text_ids(framing, "w50 w1", "x", special=True) == [56, 7]  # one beginning of text
    assert text_ids(framing, "w50 w50 w1", "x", special=True) == [56, 56, 7]
    assert text_ids(framing, "", "x", special=True) == [56]
    assert text_ids(framing, "w1", "x") == [7]
    assert text_ids(framed("w50 w51 $A"), "w1", "x", special=True) == [56, 57, 7]


def test_contrastive_instructions_before_ids_have_one_beginning_of_text() -> None:
    tokenizer = framed("w50 $A", bos_token="w50")
    reward = ContrastiveReward("w2", "w3")
    RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), reward=reward)
    assert reward.encode(Prompt([56, 7])) == [[56, 8, 7], [56, 9, 7]]


def test_a_reward_model_with_fewer_embeddings_names_the_token_id() -> None:
    decoder = RewardGuidedDecoder.from_pretrained(
        (make_lm(vocab_size=128), make_tokenizer()), reward=SequenceReward((make_rm(), make_tokenizer()))
    )
    with pytest.raises(RGTGError, match="prompt 1 for the reward model has token id 100"):
        decoder.generate([[7], [8, 100]], 2)


def test_answers_are_texts_or_ids() -> None:
    assert as_answers("w1 w2", TOKENIZER) == [IDS]
    assert as_answers(["w1", torch.tensor(IDS), (7,)], TOKENIZER) == [[7], IDS, [7]]
    assert as_answers(IDS, TOKENIZER) == [IDS]
    for bad in (TOKENIZER("w1"), [b"w1"], [None], [CHAT], 5, ["\ud83d"], [""], [[]]):
        with pytest.raises(RGTGError, match=r"^answer 0 "):
            as_answers(bad, TOKENIZER)
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), TOKENIZER), reward=(lambda p, c: c.float()))
    with pytest.raises(RGTGError, match="answer 1 has token id 64, outside the vocabulary"):
        decoder.score(["w1", "w2"], [[7], [64]])
