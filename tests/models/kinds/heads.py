"""Reward models with the heads that others save, and those that are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.conftest import CHAT_TEMPLATE, make_lm, make_tokenizer, tiny_config
from tests.models.kinds import Kind, Sources

WIDTH = 32
INNER = 20


@dataclass(frozen=True)
class Saved:
    """A reward model whose trunk is transformers' and whose head is its own.

    Attributes:
        head: shapes of the head's weights by name.
        config: what its config.json says beside the trunk's settings.
        family: `model_type` of the trunk.
        label: the label to choose, None for none.
    """

    head: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any] = field(default_factory=dict)
    family: str = "llama"
    label: str | None = None

    def config_of_trunk(self) -> Any:
        """The trunk's configuration."""
        settings = tiny_config().to_dict()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        names += ("num_key_value_heads", "max_position_embeddings", "initializer_range", "pad_token_id")
        shape = {name: settings[name] for name in names}
        config = tf.AutoConfig.for_model(self.family, **shape, bos_token_id=None, eos_token_id=1)
        if self.family == "mistral":
            config.sliding_window = None
        if self.family == "qwen2":
            config.vocab_size = len(_bytes())
        return config

    def trunk(self) -> Any:
        """The trunk, the same at every call."""
        torch.manual_seed(1)
        return tf.AutoModel.from_config(self.config_of_trunk()).eval()

    def language_model(self) -> Any:
        """A language model of the trunk's family."""
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(self.config_of_trunk()).eval()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The head's weights."""
        generator = torch.Generator().manual_seed(7)
        return {
            name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            for name, shape in self.head.items()
        }

    def save(self, folder: Path) -> Path:
        """Writes config.json, model.safetensors and the tokenizer."""
        trunk = self.trunk()
        trunk.save_pretrained(folder)
        weights = {f"model.{name}": value.contiguous() for name, value in trunk.state_dict().items()}
        save_file({**weights, **self.tensors()}, folder / "model.safetensors", metadata={"format": "pt"})
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **self.config}))
        self.tokenizer().save_pretrained(folder)
        return folder

    def tokenizer(self) -> Any:
        """The tokenizer: one of words, or of bytes where the family turns every tokenizer into one of bytes."""
        return _bytes() if self.family == "qwen2" else make_tokenizer()


def _bytes() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def labels(*names: str) -> dict[str, Any]:
    """What a config.json says of its labels."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _mlp(prefix: str, *widths: int) -> dict[str, tuple[int, ...]]:
    """Shapes of an MLP of numbered layers with functions between them."""
    found: dict[str, tuple[int, ...]] = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        found |= {f"{prefix}{2 * i}.weight": (outputs, inputs), f"{prefix}{2 * i}.bias": (outputs,)}
    return found


def _made_as(name: str, **settings: Any) -> dict[str, Any]:
    return {"architectures": [name], **settings}


ONE = labels("LABEL_0")
CLASSIFIER = _made_as("LlamaForSequenceClassification")
VOCABULARY = {"lm_head.weight": (64, WIDTH)}
SIGMOID = "torch.nn.modules.activation.Sigmoid"
OPENRLHF = {"normalize_reward": True, "mean": 0.7, "std": 2.5}
REMOTE = {
    "auto_map": {"AutoModelForSequenceClassification": "modeling_own.Own", "AutoModel": "modeling_own.Own"}
}

SAVED: dict[str, Saved] = {
    "TRL, Skywork-Reward-V2 (Llama)": Saved({"score.weight": (1, WIDTH)}, {**CLASSIFIER, **ONE}),
    "Skywork-Reward-V2 (Qwen3)": Saved(
        {"score.weight": (1, WIDTH)}, {**_made_as("Qwen3ForSequenceClassification"), **ONE}, "qwen3"
    ),
    "OpenRLHF": Saved({"value_head.weight": (1, WIDTH)}, _made_as("RewardModel")),
    "OpenRLHF, normalized": Saved({"value_head.weight": (1, WIDTH)}, _made_as("RewardModel", **OPENRLHF)),
    "OpenRLHF, `score`, normalized": Saved({"score.weight": (1, WIDTH)}, _made_as("RewardModel", **OPENRLHF)),
    "OpenRLHF, a prefix of its own": Saved(
        {"reward_out.weight": (1, WIDTH)}, _made_as("RewardModel", value_head_prefix="reward_out")
    ),
    "UltraRM": Saved({"regression_head.weight": (1, WIDTH)}, _made_as("LlamaRewardModel", **REMOTE)),
    "Eurus": Saved({"regression_head.weight": (1, WIDTH)}, _made_as("EurusRewardModel", **REMOTE), "mistral"),
    "GRM": Saved(
        {**_mlp("v_head.summary.", WIDTH, INNER, 1), **VOCABULARY}, _made_as("LlamaForCausalLM", **REMOTE)
    ),
    "GRM, two hidden layers": Saved(_mlp("v_head.summary.", WIDTH, INNER, 12, 1), _made_as("GRewardModel")),
    "GRM, linear": Saved(
        {"v_head.summary.weight": (1, WIDTH), "v_head.summary.bias": (1,)},
        _made_as("GRewardModel", vhead_layer_type="linear"),
    ),
    "INF-ORM": Saved(
        _mlp("score.", WIDTH, WIDTH, 1), {**_made_as("INFORMForSequenceClassification", **REMOTE), **ONE}
    ),
    "Qwen2.5-Math-RM": Saved(
        _mlp("score.", WIDTH, WIDTH, 1), _made_as("Qwen2ForRewardModel", **REMOTE), "qwen2"
    ),
    "a head with a bias": Saved(
        {"score.weight": (1, WIDTH), "score.bias": (1,)}, {**_made_as("LlamaForTokenClassification"), **ONE}
    ),
    "two labels": Saved(
        {"score.weight": (2, WIDTH)}, {**CLASSIFIER, **labels("rejected", "chosen")}, label="chosen"
    ),
    "a sigmoid": Saved(
        {"score.weight": (1, WIDTH)},
        {**CLASSIFIER, **ONE, "sentence_transformers": {"activation_fn": SIGMOID}},
    ),
    "one of two labels with a bias, tanh": Saved(
        {"score.weight": (2, WIDTH), "score.bias": (2,)},
        {
            **_made_as("LlamaForTokenClassification"),
            **labels("bad", "good"),
            "sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh",
        },
        label="1",
    ),
    "a vocabulary head beside the reward head": Saved(
        {"score.weight": (1, WIDTH), **VOCABULARY}, {**CLASSIFIER, **ONE}
    ),
}

# How each is served, where it is not an ordinary head.
_SERVED = {
    "OpenRLHF, normalized": "`value_head`, (r − mean) / std",
    "OpenRLHF": "`value_head`",
    "UltraRM": "`regression_head`",
    "Eurus": "`regression_head`",
    "GRM": "`v_head.summary`, an MLP in float32",
    "INF-ORM": "`score`, an MLP",
    "Qwen2.5-Math-RM": "`score`, an MLP",
    "a head with a bias": "`score` with its bias",
    "two labels": "the score of the label that `--reward-label` names",
    "a sigmoid": "as the configuration says (cross-encoders)",
}

_STEPS = "process reward model"
# Model, and a part of the reason for which it is refused.
REFUSED: dict[str, tuple[Saved, str]] = {
    "ArmoRM": (
        Saved(
            {"regression_layer.weight": (19, WIDTH), "gating.layers.0.weight": (8, WIDTH)},
            _made_as("LlamaForRewardModelWithGating", **REMOTE),
        ),
        "by a network",
    ),
    "QRM": (
        Saved(
            {"score.weight": (1, WIDTH), "reward_transform_matrix": (19, 19), "gating.layers.0.weight": (8, WIDTH)},
            {**CLASSIFIER, **ONE},
        ),
        "by a network",
    ),
    "URM": (
        Saved(
            {"score.weight": (10, WIDTH), "weights.0.weight": (5, WIDTH)},
            _made_as("LlamaForSequenceClassificationWithNormal_Weights"),
        ),
        "by a network",
    ),
    "several attributes": (
        Saved({"score.weight": (10, WIDTH)}, {**CLASSIFIER, **labels(*(f"LABEL_{i}" for i in range(10)))}),
        "has 10 labels",
    ),
    "InternLM2-reward": (
        Saved(
            {"v_head.weight": (1, WIDTH)},
            _made_as(
                "InternLM2ForRewardModel", model_type="internlm2", auto_map={"AutoConfig": "modeling_own.Config"}
            ),
        ),
        "at a token of its own",
    ),
    "Athene-RM": (
        Saved({"v_head.weight": (1, WIDTH)}, {**CLASSIFIER, **ONE}),
        "at a token of its own",
    ),
    "Qwen2.5-Math-PRM": (
        Saved(
            {f"score.{i}.{part}": shape for i, n in ((0, WIDTH), (2, 2)) for part, shape in
             (("weight", (n, WIDTH)), ("bias", (n,)))},
            _made_as("Qwen2ForProcessRewardModel"),
            "qwen2",
        ),
        _STEPS,
    ),
    "Skywork-o1-PRM": (
        Saved(
            {"v_head.summary.weight": (1, WIDTH), "v_head.summary.bias": (1,), **VOCABULARY},
            _made_as("Qwen2ForCausalLM"),
            "qwen2",
        ),
        "ends of steps",
    ),
    "Math-Shepherd, RLHFlow PRM (a language model that answers + or −)": (
        Saved(VOCABULARY, _made_as("LlamaForCausalLM")),
        "answer in tokens",
    ),
    "an MLP of unknown functions": (
        Saved(_mlp("score.", WIDTH, WIDTH, 1), {**CLASSIFIER, **ONE}),
        "do not say which functions",
    ),
}  # fmt: skip

ENCODERS: dict[str, tuple[Any, str | None]] = {
    "DeBERTa-v2": (
        tf.DebertaV2Config(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=128, pad_token_id=0, num_labels=1, initializer_range=0.4, relative_attention=True,
            pos_att_type=["p2c", "c2p"],
        ),
        None,
    ),
    "DeBERTa": (
        tf.DebertaConfig(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=128, pad_token_id=0, num_labels=1, initializer_range=0.4,
        ),
        None,
    ),
    "ModernBERT": (
        tf.ModernBertConfig(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=128, pad_token_id=0, num_labels=1, initializer_range=0.4,
        ),
        None,
    ),
    "BERT, two labels": (
        tf.BertConfig(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=128, pad_token_id=0, id2label={0: "worse", 1: "better"}, initializer_range=0.4,
        ),
        "better",
    ),
}  # fmt: skip


def encoder(name: str) -> Any:
    """A sequence classifier that is no causal model."""
    torch.manual_seed(3)
    return tf.AutoModelForSequenceClassification.from_config(ENCODERS[name][0]).eval()


def save_encoder(name: str, folder: Path) -> Path:
    """Saves `encoder(name)` with the tokenizer."""
    encoder(name).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def _sources(folder: Path, lm: Any, tokenizer: Any, reward: str, label: str | None) -> Sources:
    lm.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    return Sources(str(folder / "lm"), reward, () if label is None else ("--reward-label", label))


def _of_saved(saved: Saved) -> Callable[[Path], Sources]:
    return lambda folder: _sources(
        folder, saved.language_model(), saved.tokenizer(), str(saved.save(folder / "rm")), saved.label
    )


def _of_encoder(name: str) -> Callable[[Path], Sources]:
    return lambda folder: _sources(
        folder, make_lm(), make_tokenizer(), f"text:{save_encoder(name, folder / 'rm')}", ENCODERS[name][1]
    )


KINDS: list[Kind] = [
    *(
        Kind(name, "reward model", _of_saved(saved), served=_SERVED.get(name, "cached"))
        for name, saved in SAVED.items()
    ),
    *(
        Kind(f"{name} (`text:`)", "reward model", _of_encoder(name), served="whole texts, no cache")
        for name in ENCODERS
    ),
    *(
        Kind(name, "reward model", _of_saved(saved), refused=reason)
        for name, (saved, reason) in REFUSED.items()
    ),
]
