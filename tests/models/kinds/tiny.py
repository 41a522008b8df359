"""Tiny models and tokenizers on disk, for the kinds of models and for the tests of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

CONTEXT = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
SPECIAL = ("<pad>", "<s>", "</s>")
# Of every family that has them; its other sizes are its own.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def byte_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE, shift: int = 0, special: tuple[str, ...] = SPECIAL
) -> PreTrainedTokenizerFast:
    """One token a byte and the special ones: every text and every token sequence goes through it.

    Args:
        chat_template: None for a tokenizer without one.
        shift: turns the bytes' ids by so many; tokenizers with different shifts differ.
        special: names of the padding, beginning and end tokens, and of further ones.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [*alphabet[shift:], *alphabet[:shift]]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos, *further = special
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=further,
    )
    fast.chat_template = chat_template
    return fast


VOCABULARY = len(byte_tokenizer())


def config(family: str, **changes: Any) -> Any:
    """A family's config of a few thousand parameters.

    Args:
        family: its `model_type`, such as "qwen2".
        changes: other settings.
    """
    known = AutoConfig.for_model(family)
    # A size that a family does not have would be kept and read, GPT-2's number of key-value heads for instance.
    sizes = {name: size for name, size in SIZES.items() if hasattr(known, name)}
    return AutoConfig.for_model(family, **{"vocab_size": VOCABULARY, **sizes, **changes})


def language_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A causal language model of a family with random weights, norms and biases among them; settings as in `config`."""
    torch.manual_seed(seed)
    return spread(AutoModelForCausalLM.from_config(config(family, **changes)))


def reward_model(family: str, seed: int = 1, **changes: Any) -> Any:
    """A sequence classifier of a family with one label, as `language_model`."""
    torch.manual_seed(seed)
    return spread(AutoModelForSequenceClassification.from_config(config(family, num_labels=1, **changes)))


def spread(model: Any, by: float = 0.15) -> Any:
    """Adds noise to all weights, so that no norm is 1, no bias 0 and no distribution flat."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn_like(parameter)
    return model.float().eval()


def save(model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """Saves a model and a tokenizer, by default `byte_tokenizer()`; returns the folder as a path to pass on."""
    model.save_pretrained(folder)
    (byte_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return str(folder)


def llama(folder: Path) -> str:
    """A saved Llama below a folder: the language model of kinds of reward models."""
    return save(language_model("llama"), folder / "lm")


def llama_reward(folder: Path) -> str:
    """A saved Llama with a one-label `score` head below a folder: the reward model of kinds of language models."""
    return save(reward_model("llama"), folder / "rm")
