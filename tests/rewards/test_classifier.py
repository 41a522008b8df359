"""Sequence classifiers over texts: padding, positions and special tokens change no reward."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, TextReward
from rgtg_fast.models.runner import Counter
from rgtg_fast.rewards.classifier import Classifier
from tests.conftest import CHAT_TEMPLATE, make_lm, make_rm, make_tokenizer

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "num_labels": 1,
    "initializer_range": 0.4,
}
GPT2 = {
    "vocab_size": 64,
    "n_positions": 24,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "num_labels": 1,
    "initializer_range": 0.4,
}
XLNET = {"vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16, "num_labels": 1}
T5 = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_labels": 1,
}
# A configuration, and the tokens that its positions hold.
ENCODERS: dict[str, tuple[tf.PretrainedConfig, int | None]] = {
    "bert": (tf.BertConfig(**SHAPE), 24),
    "roberta": (tf.RobertaConfig(**{**SHAPE, "pad_token_id": 1, "type_vocab_size": 1}), 22),
    "mpnet": (tf.MPNetConfig(**{**SHAPE, "pad_token_id": 1}), 22),
    "longformer": (tf.LongformerConfig(**SHAPE, attention_window=8), 23),
    "deberta": (tf.DebertaV2Config(**SHAPE, relative_attention=True, pos_att_type=["p2c", "c2p"]), 24),
    "modernbert": (tf.ModernBertConfig(**SHAPE), 24),
    "convbert, which reads padding": (tf.ConvBertConfig(**SHAPE), 24),
    "xlnet, which pools at the last place": (tf.XLNetConfig(**XLNET), None),
    "t5, which pools at the end of text": (
        tf.T5Config(**T5, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0),
        None,
    ),
}
CAUSAL = {
    "another pad id": lambda: (make_rm(pad_token_id=63), make_tokenizer()),
    "no pad id in the model": lambda: (make_rm(pad_token_id=None), make_tokenizer()),
    "no padding at all": lambda: (make_rm(pad_token_id=None), _tokenizer(pad_token=None, eos_token=None)),
    "padding is the end": lambda: (make_rm(pad_token_id=1), _tokenizer(pad_token="<eos>")),
    "padding on the left": lambda: (_made(tf.GPT2Config(**GPT2)), _tokenizer(padding_side="left")),
    "opt": lambda: (_made(tf.OPTConfig(**OPT)), make_tokenizer()),
}
OPT = {**GPT2, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 2}
OPT = {**OPT, "num_attention_heads": 2, "max_position_embeddings": 24, "pad_token_id": 1, "init_std": 0.4}
LONG = " ".join(f"w{i}" for i in range(40))


def _made(config: tf.PretrainedConfig) -> Any:
    torch.manual_seed(5)
    return AutoModelForSequenceClassification.from_config(config).eval()


def _tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


def _framing() -> PreTrainedTokenizerFast:
    """An encoder's tokenizer: `w50 … <eos>`, and for pairs `w50 … w51 … <eos>`."""
    tokenizer = _tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    tokens = [("<eos>", 1), ("w50", 56), ("w51", 57)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w50 $A <eos>", pair="w50 $A w51 $B:1 <eos>:1", special_tokens=tokens
    )
    return tokenizer


@torch.no_grad()
def _alone(model: Any, ids: list[int], **arguments: Any) -> float:
    """What transformers says of one text; a causal model's padding token is taken away, so that it reads the last."""
    config, pad = model.config, model.config.pad_token_id
    if "score" in dict(model.named_children()):
        config.pad_token_id = None
    try:
        return model(input_ids=torch.tensor([ids]), **arguments).logits.item()
    finally:
        config.pad_token_id = pad


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_rewards_are_those_of_each_text_alone(name: str, pairs: bool) -> None:
    config, positions = ENCODERS[name]
    model = _made(config)
    classifier = Classifier(model, _framing(), name, None)
    assert classifier.max_length == positions
    texts = ["w1", "w2 <eos> w3 w4 w5 w6", "w7 w8", LONG]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows = classifier.encode(texts, texts[::-1] if pairs else None, special=True)
        rewards = classifier.rewards(rows, Counter()).tolist()
    assert len(said) == (positions is not None)
    for row, reward in zip(rows, rewards, strict=True):
        assert row["input_ids"][0] == 56
        assert row["input_ids"][-1] == 1
        reads_types = pairs and name not in (
            "roberta",
            "mpnet",
            "deberta",
            "modernbert",
            *list(ENCODERS)[-1:],
        )
        types = {"token_type_ids": torch.tensor([row["token_type_ids"]])} if reads_types else {}
        assert reward == pytest.approx(_alone(model, row["input_ids"], **types), abs=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_is_read_at_the_last_token(name: str) -> None:
    model, tokenizer = CAUSAL[name]()
    classifier = Classifier(model, tokenizer, name, None)
    texts = ["w1", "w2 w3 w4 w5 w6", "w7 w8 <eos>", "w7 <eos> <eos>", "w9 <pad>"]
    rows = classifier.encode(texts, None, special=True)
    counter = Counter()
    rewards = classifier.rewards(rows, counter).tolist()
    assert (counter.calls, counter.tokens) == (1, sum(len(row["input_ids"]) for row in rows))
    for row, reward in zip(rows, rewards, strict=True):
        assert reward == pytest.approx(_alone(model, row["input_ids"]), abs=1e-5)


@pytest.mark.parametrize("name", ["padding is the end", "another pad id", "padding on the left"])
def test_a_row_has_its_rewards_beside_a_longer_one(name: str) -> None:
    model, tokenizer = CAUSAL[name]()
    side, padding = tokenizer.padding_side, (tokenizer.pad_token_id, model.config.pad_token_id)
    tokenizer.chat_template = CHAT_TEMPLATE + "<eos>"
    chats = [[{"role": "user", "content": text}] for text in ("w1", "w2 w3 w4 w5 w6")]
    guidance = Guidance(k=4, temperature=0)
    decoder = RewardGuidedDecoder.from_pretrained(
        (make_lm(), make_tokenizer()), reward=TextReward((model, tokenizer))
    )
    together, alone = decoder.generate(chats, 4, guidance)[0], decoder.generate(chats[:1], 4, guidance)[0]
    assert together.tokens == alone.tokens
    for i, reward in enumerate(together.rewards):
        answer = decoder.lm.text(together.tokens[: i + 1])
        turns = [*chats[0], {"role": "assistant", "content": answer}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)
        assert ids["input_ids"][-1] == 1
        assert reward == pytest.approx(_alone(model, ids["input_ids"]), abs=1e-5)
    # What was handed over is as it was.
    assert side == tokenizer.padding_side
    assert padding == (tokenizer.pad_token_id, model.config.pad_token_id)


def test_a_long_text_keeps_its_end_and_what_frames_it() -> None:
    tokenizer = _framing()
    classifier = Classifier(_made(tf.BertConfig(**SHAPE)), tokenizer, "bert", 6)
    with pytest.warns(UserWarning, match="bert reads 6 tokens of a text and one has 12"):
        assert classifier.encode([" ".join(f"w{i}" for i in range(10))], None, True)[0]["input_ids"] == [
            56, 12, 13, 14, 15, 1,
        ]  # fmt: skip
    assert classifier.encode(["w1 w1"], ["w2 w2 w2 w2"], True)[0]["input_ids"][-2:] == [8, 1]
    tokenizer.bos_token = "w50"
    chat = Classifier(_made(tf.BertConfig(**SHAPE)), tokenizer, "bert", 6)
    with pytest.warns(UserWarning, match="one has 9"):
        rows = chat.encode(["w50 w1 w2 w3 w4 w5 w6 w7 w8", "w1"], None, False)
    assert [row["input_ids"] for row in rows] == [[56, 10, 11, 12, 13, 14], [7]]


def test_a_text_that_begins_itself_begins_once() -> None:
    classifier = Classifier(make_rm(), _framing(), "rm", None)
    rows = classifier.encode(["w50 w1", "w1"], None, special=True)
    assert [row["input_ids"] for row in rows] == [[56, 7, 1]] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 23}, "max_length=23 exceeds the 22 positions"),
        ({"max_length": 3}, "max_length=3 leaves no tokens"),
        ({"max_length": True}, "max_length=True leaves no tokens"),
        ({"max_length": 6.0}, "max_length=6.0 leaves no tokens"),
    ],
)
def test_lengths_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    reward = TextReward((_made(ENCODERS["roberta"][0]), _framing()), **settings)
    with pytest.raises(RGTGError, match=message):
        RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), reward=reward)


def test_a_model_that_cannot_read_is_one_line() -> None:
    small = _made(tf.BertConfig(**{**SHAPE, "vocab_size": 4}))
    with pytest.raises(RGTGError, match=re.escape("token id 7 and the model has embeddings for 4")):
        Classifier(small, make_tokenizer(), "bert", None).encode(["w1"], None, False)
    with pytest.raises(RGTGError, match="a text of 0 tokens"):
        Classifier(make_rm(), make_tokenizer(), "rm", None).encode([""], None, False)
    # Its code asks for a number that its configuration lacks.
    t5 = tf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, num_labels=1)
    with pytest.raises(RGTGError, match=r"cannot read a text of .*decoder_start_token_id"):
        Classifier(_made(t5), make_tokenizer(), "t5", None)
    hidden = make_rm()
    hidden.model.embed_positions = torch.nn.Embedding(4, 4)  # a table that the configuration does not tell of
    assert Classifier(hidden, make_tokenizer(), "rm", None).max_length == 4

    class Elsewhere(type(hidden)):
        def forward(self, *arguments: Any, **named: Any) -> Any:
            out = super().forward(*arguments, **named)
            out.logits = -out.logits
            return out

    hidden.__class__ = Elsewhere
    with pytest.raises(RGTGError, match="does not read a text at its last token"):
        Classifier(hidden, make_tokenizer(), "rm", None)


def test_a_chat_that_the_reward_models_template_refuses_is_named_first() -> None:
    no_system = CHAT_TEMPLATE.replace(
        "<{{", "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}<{{", 1
    )
    chats = [[{"role": role, "content": "w1"}] for role in ("user", "system")]
    decoder = RewardGuidedDecoder.from_pretrained(
        (make_lm(), make_tokenizer()), reward=TextReward((make_rm(), make_tokenizer(no_system)))
    )
    with pytest.raises(RGTGError, match=r"^prompt 1 with an answer .*no system"):
        decoder.iterate(chats, 2)


def test_a_template_takes_texts_as_they_are() -> None:
    seen: list[str] = []
    rm = make_rm()
    reward = TextReward((rm, make_tokenizer()), template="{prompt} w9 {answer}")
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), make_tokenizer()), reward=reward)
    row = decoder.generate("w1 {answer} w2", 2, Guidance(k=2, temperature=0))[0]
    seen = [decoder.lm.text(row.tokens[: i + 1]) for i in range(len(row.tokens))]
    for answer, given in zip(seen, row.rewards, strict=True):
        ids = make_tokenizer()(f"w1 {{answer}} w2 w9 {answer}")["input_ids"]
        assert given == pytest.approx(_alone(rm, ids), abs=1e-5)
