"""Whether a reward model fits the base model: its tokenizer, its prompt format, and whether it can share a forward."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import adapter_tokenizer, refuse_bundled
from rgtg_fast.models.prompts import text_ids
from rgtg_fast.models.quantized import check_weights
from rgtg_fast.models.tensor_parallel import spread_over

# Tokenized under both tokenizers to see that they split text alike, which equal vocabularies do not promise.
_PROBE = "Human: Is 1,234.5 °C hot?\n\nAssistant: Yes — it's  HOT, naïve friend! 你好 🙂"


def unbound(reward: str) -> RGTGError:
    """The error of a reward that is used before a decoder has bound it."""
    return RGTGError(
        f"this {reward} belongs to no decoder yet: pass it to RewardGuidedDecoder.from_pretrained"
    )


def check_rounding(weights: str | None, source: object, share_trunk: bool | None = None) -> None:
    """Refuses to round the weights of a model that is someone else's.

    Args:
        weights: as in `SequenceReward`.
        source: what the reward, or the decoder, was given as its model.
        share_trunk: as in `SequenceReward`.

    Raises:
        RGTGError: unknown weights, a loaded pair, or the base model's trunk.
    """
    check_weights(weights)
    if weights is not None and isinstance(source, (tuple, list)):
        raise RGTGError(
            f"weights={weights!r} rounds a model in place and this one was loaded by you: pass its path or hub id"
        )
    if weights is not None and share_trunk:
        raise RGTGError(
            f"weights={weights!r} and share_trunk=True, which computes with the base model's weights: use one of them"
        )


def place_adapter(
    adapter: Adapter,
    lm: LanguageModel,
    chat_template: str | None,
    share_trunk: bool | None,
    weights: str | None = None,
) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """Decides whether an adapter is executed in the base model's own forward.

    Args:
        adapter: adapter of a reward model.
        lm: the base model.
        chat_template: as in `SequenceReward`.
        share_trunk: as in `SequenceReward`.
        weights: as in `SequenceReward`; the base model's own are not rounded.

    Returns:
        The adapter's tokenizer, and in words why it is not executed there; None where it is.

    Raises:
        RGTGError: another tokenizer, or `share_trunk=True` where it cannot be.
    """
    if (count := spread_over(lm.runner.model)) > 1:
        raise RGTGError(
            f"{adapter.name} is an adapter and the base model is spread over {count} processes: name a reward model "
            "with weights of its own, such as the adapter merged into its base"
        )
    tokenizer = adapter_tokenizer(adapter.name) or lm.tokenizer
    try:
        check_same_tokenizer(lm.tokenizer, tokenizer, lm.runner.name, adapter.name)
    except RGTGError:
        refuse_bundled(adapter, lm.runner.model)
        raise
    if share_trunk is False:
        return tokenizer, "share_trunk=False"
    if weights is not None:
        return tokenizer, f"weights={weights!r}"
    if lm.other_device is not None:
        if share_trunk:
            raise RGTGError(
                f"share_trunk=True runs {adapter.name} in the base model's forward on {lm.runner.device} and "
                f"reward_device is {lm.other_device}: leave out one of them"
            )
        return tokenizer, f"reward_device={str(lm.other_device)!r}"
    why = None if lm.shares_forward else "another engine executes the base model"
    why = why or adapter.base_mismatch(lm.runner.model)
    why = why or other_prompts(lm.tokenizer, tokenizer, chat_template, adapter.name)
    if share_trunk and why is not None:
        raise RGTGError(f"share_trunk=True: {why}; use share_trunk=None for a model of its own")
    return tokenizer, why


def other_prompts(
    base: PreTrainedTokenizerBase | None,
    own: PreTrainedTokenizerBase | None,
    chat_template: str | None,
    name: str,
) -> str | None:
    """Why a prompt has other token ids under a reward model than under the base model, None where it has the same.

    Args:
        base: the base model's tokenizer.
        own: the reward model's.
        chat_template: given for the reward model.
        name: name of the reward model.
    """
    if base is None or own is None:
        return None if chat_template is None else f"{name} has a chat template and the base model none"
    template = chat_template or own.chat_template
    if template is not None and template != base.chat_template:
        return f"{name} has another chat template than the base model"
    if text_ids(own, _PROBE, name, special=True) != text_ids(base, _PROBE, name, special=True):
        return f"{name} begins its prompts with other special tokens than the base model"
    return None


def check_same_tokenizer(
    lm: PreTrainedTokenizerBase | None, rm: PreTrainedTokenizerBase | None, lm_name: str, rm_name: str
) -> None:
    """Refuses a reward model whose tokenizer gives the base model's tokens other ids.

    Raises:
        RGTGError: naming the first difference and how many there are.
    """
    if lm is None or rm is None:
        return
    difference = tokenizer_difference(lm, rm)
    if difference is not None:
        raise RGTGError(
            f"the tokenizers of {lm_name} and {rm_name} {difference}; use a reward model over the same tokenizer, or "
            f"'text:{rm_name}' (TextReward), which reads whole texts"
        )


def tokenizer_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    """How the second tokenizer gives tokens of the first one other ids, in words that follow the names of the two.

    Args:
        first: the base model's.
        second: the reward model's, which may have further tokens.

    Returns:
        None where every text has the same ids.
    """
    if first is second:
        return None
    ours, theirs = first.get_vocab(), second.get_vocab()
    other = [(index, token) for token, index in ours.items() if theirs.get(token) != index]
    if other:
        index, token = min(other)
        there = theirs.get(token)
        place = "is not in the second" if there is None else f"has id {there} in the second"
        return (
            f"differ in {len(other)} of {len(ours)} tokens: token {index} is {token!r} in the first and {token!r} "
            f"{place}"
        )
    if text_ids(first, _PROBE, "a probe") != text_ids(second, _PROBE, "a probe"):
        return "split the same text differently"
    return None
