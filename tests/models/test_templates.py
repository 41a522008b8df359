"""A prompt and its answer are read as the chat template reads the whole chat, or a warning says where they part."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rgtg_fast import Guidance, RewardGuidedDecoder, SequenceReward
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.models.templates import template_difference
from tests.models.kinds.tiny import CHAT_TEMPLATE, byte_tokenizer, language_model, reward_model

ROLE = "{{ m['role'] }}: "
THINKS = CHAT_TEMPLATE.replace(ROLE, ROLE + "{% if m['role'] == 'assistant' %}<t></t>{% endif %}")
PROMPT_THINKS = CHAT_TEMPLATE.replace("assistant: {%", "assistant: <t></t>{%")
NO_HEADER = CHAT_TEMPLATE.partition("{% if add")[0]
NO_SPACE = CHAT_TEMPLATE.replace("assistant: {%", "assistant:{%")
CHANGES = CHAT_TEMPLATE.replace("m['content']", "m['content'] | upper")
REFUSES = CHAT_TEMPLATE.replace(
    "<s>{{", "{% if m['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}<s>{{", 1
)
OTHER_ENDING = THINKS.replace("assistant: {%", "assistant (thinks){%")
CHAT = [{"role": "user", "content": "Where is it?"}]
ANSWER = "Over there."


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE, REFUSES, "{% for"])
def test_no_difference(template: str | None) -> None:
    assert template_difference(byte_tokenizer(template)) is None


@pytest.mark.parametrize(
    ("template", "ends_in", "replaced_by", "known", "meaning"),
    [
        (THINKS, "", "<t></t>", True, "the prompt ends before '<t></t>'"),
        (NO_HEADER, "", "<s>assistant: ", True, "the prompt ends before '<s>assistant: '"),
        (PROMPT_THINKS, "<t></t>", "", False, "only the prompt ends in '<t></t>'"),
        (OTHER_ENDING, " (thinks)", ": <t></t>", False, "and a whole chat has ': <t></t>' there"),
        (NO_SPACE, "", " ", False, "let an answer that you pass as text begin with ' '"),
        (CHANGES, "", "", False, "it does not repeat an answer as it is"),
    ],
    ids=["thinks", "no header", "prompt thinks", "other ending", "no space", "changes"],
)
def test_differences(template: str, ends_in: str, replaced_by: str, known: bool, meaning: str) -> None:
    found = template_difference(byte_tokenizer(), template)
    assert found is not None
    assert (found.ends_in, found.replaced_by, found.known) == (ends_in, replaced_by, known)
    line = found.message("language model", "some/folder")
    assert meaning in line
    assert found.whole in line
    assert found.pieces in line
    assert "\n" not in line


def _joining() -> PreTrainedTokenizerFast:
    """A tokenizer of words that begin with their space: " Yes" is one token, a space and "Yes" are two."""
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        " ",
        ":",
        "user",
        "assistant",
        "Yes",
        " Yes",
        ",",
        " it",
        " is",
        " wet",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[^>]+>| ?\w+|[^\w<]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_tokens_that_join_across_the_end_of_the_prompt() -> None:
    tokenizer = _joining()
    found = template_difference(tokenizer, CHAT_TEMPLATE)
    assert found is not None
    assert not found.known
    assert "tokens join across the end of the prompt" in found.message("language model", "x")
    assert not found.texts_only
    assert "| Yes|" in found.whole
    assert "| |Yes|" in found.pieces


def test_a_tokenizer_that_begins_every_text_with_a_space() -> None:
    """As that of Llama 2: decoded tokens read as in a whole chat, and a text alone has other tokens."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "▁", "\n", *"Yes,itwuarnIl?mod:", "▁Yes", "▁it", "▁is"]
    tokenizer = Tokenizer(
        models.Unigram([(word, -len(words) + len(word)) for word in dict.fromkeys(words)], 3)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}model:\n{% endif %}"
    ).replace("{{ m['role'] }}", "{{ 'model' if m['role'] == 'assistant' else 'user' }}")
    found = template_difference(fast)
    assert found is not None
    assert found.texts_only
    assert "pass the token ids of an answer" in found.message("language model", "x")
    model = language_model("llama", vocab_size=len(fast))
    reward = SequenceReward((reward_model("llama", vocab_size=len(fast)), fast))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = RewardGuidedDecoder.from_pretrained((model, fast), reward=reward)
        decoder.score([CHAT], [[10, 11]])
        decoder.score(["Is it"], ["wet"])
    with pytest.warns(UserWarning, match="not its text"):
        decoder.score([CHAT], ["Yes, it is wet."])


def test_the_language_models_difference_is_a_warning_with_both_renderings() -> None:
    with pytest.warns(UserWarning, match="language model LlamaForCausalLM") as caught:
        RewardGuidedDecoder.from_pretrained((language_model("llama"), byte_tokenizer(THINKS)))
    (line,) = {str(each.message) for each in caught}
    assert "<t>" in line
    assert "Yes" in line


@pytest.mark.parametrize("template", [THINKS, NO_HEADER])
def test_a_reward_models_prompt_ends_as_its_whole_chats_do(template: str) -> None:
    """The rewards are those of the reward model's own forward over the rendered chat."""
    model, own = reward_model("llama"), byte_tokenizer(template)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = RewardGuidedDecoder.from_pretrained(
            (language_model("llama"), byte_tokenizer()), reward=SequenceReward((model, own))
        )
    (rewards,) = decoder.score([CHAT], [ANSWER])
    whole = own.apply_chat_template([*CHAT, {"role": "assistant", "content": ANSWER}], tokenize=False)
    ids = own(whole.partition(ANSWER)[0] + ANSWER, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        states = model.model(torch.tensor([ids])).last_hidden_state[0]
        expected = model.score(states)[len(ids) - len(ANSWER) :, 0]
    assert rewards == pytest.approx(expected.tolist(), abs=1e-4)
    row = decoder.generate([CHAT], 3, Guidance(k=4, temperature=0))[0]
    assert decoder.score([CHAT], [row.tokens])[0] == pytest.approx(row.rewards, abs=1e-4)


def test_a_reward_model_with_the_base_models_template_reads_what_that_writes() -> None:
    with pytest.warns(UserWarning, match="language model") as caught:
        decoder = RewardGuidedDecoder.from_pretrained(
            (language_model("llama"), byte_tokenizer(THINKS)),
            reward=SequenceReward((reward_model("llama"), byte_tokenizer(THINKS))),
        )
    assert len({str(each.message) for each in caught}) == 1
    prompt = Prompt(CHAT)
    assert decoder.reward is not None
    assert decoder.reward.encode(prompt) == [prompt.ids(decoder.tokenizer)]


@pytest.mark.parametrize(("own", "given"), [(CHANGES, None), (PROMPT_THINKS, None), (None, THINKS)])
def test_a_reward_models_other_difference_is_a_warning(own: str | None, given: str | None) -> None:
    """A template that changes answers, one whose prompts end in something of their own, and one that the user wrote."""
    reward = SequenceReward((reward_model("llama"), byte_tokenizer(own)), chat_template=given)
    with pytest.warns(UserWarning, match="reward model LlamaForSequenceClassification"):
        RewardGuidedDecoder.from_pretrained((language_model("llama"), byte_tokenizer()), reward=reward)


@pytest.mark.parametrize("single", ["<s> $A", "$A </s>", "<s> $A </s>"])
def test_special_tokens_of_a_tokenizer_are_no_part_of_a_chat(single: str) -> None:
    """Neither a second beginning of text nor an end of text before the answer."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert template_difference(tokenizer) is None
    assert Prompt(CHAT).ids(tokenizer) == Prompt(CHAT).ids(byte_tokenizer())


def test_the_embedded_model_has_no_difference(smollm2: Path) -> None:
    assert template_difference(AutoTokenizer.from_pretrained(smollm2)) is None
