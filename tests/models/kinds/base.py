"""Language models and rewards with plain attention, and what no prefix cache can serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.models.adapters import write_adapter
from tests.models.kinds import Kind, Sources
from tests.models.kinds.tiny import (
    byte_tokenizer,
    config,
    language_model,
    llama,
    llama_reward,
    reward_model,
    save,
    spread,
)

LM, REWARD = "language model", "reward model"
CACHED = "prefix cache"
ON_TEXTS = "whole texts, `text:PATH`"


def of_family(family: str, **changes: Any) -> Callable[[Path], Sources]:
    """A language model of a family, guided by contrastive prompts; settings as in `tiny.config`."""

    def build(folder: Path) -> Sources:
        return Sources(save(language_model(family, **changes), folder / "lm"), "contrastive")

    return build


def rewarded(prefix: str, model: Callable[[], Any], tokenizer: Any = None) -> Callable[[Path], Sources]:
    """A Llama and a reward model of its own.

    Args:
        prefix: what `--reward` has before the path.
        model: makes the reward model.
        tokenizer: the reward model's, by default the language model's.
    """

    def build(folder: Path) -> Sources:
        return Sources(llama(folder), prefix + save(model(), folder / "rm", tokenizer))

    return build


def with_adapter(prefix: str, **settings: Any) -> Callable[[Path], Sources]:
    """A Llama and a LoRA adapter on it; settings as in `write_adapter`."""

    def build(folder: Path) -> Sources:
        base = llama(folder)
        written = write_adapter(folder / "adapter", AutoModelForCausalLM.from_pretrained(base), **settings)
        return Sources(base, f"{prefix}{written}")

    return build


def _contrastive(folder: Path) -> Sources:
    return Sources(llama(folder), "contrastive", ("--better", "Be kind.", "--worse", "Be rude."))


def _none(folder: Path) -> Sources:
    return Sources(llama(folder), "none")


def _mixture(folder: Path) -> Sources:
    return Sources(llama(folder), f"mixture:0.7*pargs:{llama_reward(folder)}+0.3*contrastive")


def _log_ratio(folder: Path) -> Sources:
    tuned = save(language_model("llama", seed=2), folder / "tuned")
    return Sources(llama(folder), f"eft:{tuned},{save(language_model('llama', seed=3), folder / 'untuned')}")


def _trained_policy(folder: Path) -> Sources:
    base = AutoModelForCausalLM.from_pretrained(llama(folder))
    policy = write_adapter(folder / "policy", base, head=None, task_type="CAUSAL_LM", modules_to_save=None)
    return Sources(str(policy), "none")


def _encoder_decoder(folder: Path) -> Sources:
    model = AutoModelForSeq2SeqLM.from_config(config("t5", d_model=32, d_ff=48, d_kv=8, num_layers=2))
    return Sources(save(spread(model), folder / "lm"), "none")


def _mamba(folder: Path) -> Sources:
    model = language_model("mamba", state_size=4, time_step_rank=4)
    return Sources(save(model, folder / "lm"), "none")


def _no_tokenizer(folder: Path) -> Sources:
    model = language_model("llama")
    model.save_pretrained(folder / "lm")
    return Sources(str(folder / "lm"), "none")


KINDS = [
    Kind("Llama", LM, of_family("llama"), CACHED),
    Kind("Qwen2", LM, of_family("qwen2"), CACHED),
    Kind("Qwen3", LM, of_family("qwen3", head_dim=8), CACHED),
    Kind("Gemma", LM, of_family("gemma", head_dim=8), CACHED),
    Kind("Mistral without a window", LM, of_family("mistral", sliding_window=None), CACHED),
    Kind("Phi", LM, of_family("phi"), CACHED),
    Kind("GPT-NeoX", LM, of_family("gpt_neox"), CACHED),
    Kind("OPT", LM, of_family("opt", ffn_dim=48, word_embed_proj_dim=32), CACHED),
    Kind("GPT-2", LM, of_family("gpt2"), CACHED),
    Kind("a policy: LoRA adapter on a language model", LM, _trained_policy, "merged into a copy of its base"),
    Kind("Mamba", LM, _mamba, refused="it keeps a recurrent state"),
    Kind("T5 (encoder-decoder)", LM, _encoder_decoder, refused="is of a family that is not supported"),
    Kind(
        "a folder without a tokenizer", LM, _no_tokenizer, refused="it contains no tokenizer (tokenizer.json)"
    ),
    Kind("no reward (`none`)", REWARD, _none, "the language model alone"),
    Kind("contrastive prompts", REWARD, _contrastive, "two more rows of the language model"),
    Kind("one label, `score` head", REWARD, rewarded("", lambda: reward_model("llama")), CACHED),
    Kind(
        "one label, another family than the language model's",
        REWARD,
        rewarded("", lambda: reward_model("gpt2")),
        CACHED,
    ),
    Kind("RAD (`rad:`)", REWARD, rewarded("rad:", lambda: reward_model("llama")), CACHED),
    Kind(
        "LoRA adapter with a `score` head", REWARD, with_adapter("", fork=1), "the language model's forward"
    ),
    Kind("FaRMA (`farma:`)", REWARD, rewarded("farma:", lambda: language_model("llama", seed=2)), CACHED),
    Kind("GenARM (`genarm:`)", REWARD, rewarded("genarm:", lambda: language_model("llama", seed=2)), CACHED),
    Kind(
        "GenARM as a LoRA adapter",
        REWARD,
        with_adapter("genarm:", fork=1, head=None, task_type="CAUSAL_LM", modules_to_save=None),
        "the language model's forward",
    ),
    Kind("log-ratio of two models (`eft:`)", REWARD, _log_ratio, CACHED),
    Kind("a mixture (`mixture:`)", REWARD, _mixture, "each part as alone"),
    Kind(
        "another tokenizer",
        REWARD,
        rewarded("", lambda: reward_model("llama"), byte_tokenizer(shift=1)),
        refused="differ in 256 of 259 tokens: token 3 is '!' in the first and '!' has id 258 in the second; use a "
        "reward model over the same tokenizer",
    ),
    Kind(
        "another tokenizer, by `text:`",
        REWARD,
        rewarded("text:", lambda: reward_model("llama"), byte_tokenizer(shift=1)),
        ON_TEXTS,
    ),
    Kind("BERT classifier", REWARD, rewarded("text:", lambda: reward_model("bert")), ON_TEXTS),
    Kind(
        "an encoder as a causal reward model",
        REWARD,
        rewarded("", lambda: reward_model("bert")),
        refused="for an encoder or another tokenizer use reward=TextReward(...)",
    ),
]
