"""The decoder that `custom_generate` keeps with a model for the model's next call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.decoder import RewardGuidedDecoder, RewardLike
from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.pretrained import read_tokenizer

# Attribute of a model.
_ATTRIBUTE = "_rgtg_fast_decoder"
_finding = threading.Lock()


class KeptDecoder:
    """The decoder of a model's last call, in an attribute of the model that its copies and pickles do without."""

    def __init__(self, model: PreTrainedModel):
        self.model = weakref.ref(model)
        self.lock = threading.RLock()
        self.decoder: RewardGuidedDecoder | None = None
        self.reward: RewardLike = None
        self.tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> KeptDecoder:
        with _finding:
            kept = vars(model).get(_ATTRIBUTE)
            if not isinstance(kept, cls) or kept.model() is not model:
                kept = vars(model)[_ATTRIBUTE] = cls(model)
            return kept

    def begun(
        self, model: PreTrainedModel, reward: RewardLike, tokenizer: PreTrainedTokenizerBase | None
    ) -> RewardGuidedDecoder:
        """The decoder, made anew where the reward is another one or the model was changed beyond its weights."""
        if self.decoder is not None and _same(reward, self.reward) and tokenizer is self.tokenizer:
            try:
                return _begun(self.decoder)
            except RGTGError:
                pass  # the new one says what is wrong, if anything still is
        self.decoder = None  # its memory is free before the next one takes more
        self.decoder = _make(model, reward, tokenizer)
        self.reward, self.tokenizer = reward, tokenizer
        return _begun(self.decoder)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _same(one: RewardLike, other: RewardLike) -> bool:
    """Whether two rewards are one object, one name, or made from the same settings of a guided folder."""
    if one is other or (isinstance(one, str) and one == other):
        return True
    made = getattr(one, "_made_from", None)
    return made is not None and made == getattr(other, "_made_from", None)


@contextmanager
def decoder_for(
    model: PreTrainedModel,
    reward: RewardLike,
    tokenizer: PreTrainedTokenizerBase | None,
    given: RewardGuidedDecoder | None,
    rows: int,
) -> Iterator[RewardGuidedDecoder]:
    """A decoder that has taken over the model's weights, for one call at a time, with a slot for each of its rows.

    All rows are decoded at once, as generate() does, so that stopping criteria and streamers see whole steps.

    Raises:
        RGTGError: no reward, a decoder of another model, or one beside a reward; the models do not fit.
    """
    if given is not None and not isinstance(given, RewardGuidedDecoder):
        raise RGTGError(
            f"decoder={shown(given)} is not a decoder: pass RewardGuidedDecoder.from_pretrained((model, tokenizer), "
            "reward)"
        )
    if given is None and reward is None:
        raise RGTGError(
            "there is no reward: pass reward=... (without custom_generate the base model decodes alone)"
        )
    if given is not None and (reward is not None or tokenizer is not None):
        raise RGTGError("decoder and a reward or tokenizer, which it has already: pass one of the two")
    if given is not None and given.lm.runner.model is not model:
        raise RGTGError("this decoder belongs to another model: make it from (model, tokenizer)")
    kept = KeptDecoder.of(model)
    with kept.lock:
        used = _begun(given) if given is not None else kept.begun(model, reward, tokenizer)
        before, used._scheduler.max_batch = used.max_batch, rows
        try:
            yield used
        finally:
            used._scheduler.max_batch = before


def _begun(decoder: RewardGuidedDecoder) -> RewardGuidedDecoder:
    with decoder._turns.taken():
        decoder._turns.begin()
    return decoder


def _make(
    model: PreTrainedModel, reward: RewardLike, tokenizer: PreTrainedTokenizerBase | None
) -> RewardGuidedDecoder:
    """A decoder of the caller's model, whose training mode and weights stay as they are."""
    training = [module for module in model.modules() if module.training]
    name = model.config._name_or_path
    if tokenizer is None and name:
        try:
            tokenizer = read_tokenizer(name, "language model")
        except RGTGError:
            tokenizer = None  # prompts are token ids; a reward that needs text says so
    try:
        return RewardGuidedDecoder.from_pretrained((model, tokenizer), reward, fuse_projections=False)
    finally:
        for module in training:
            module.training = True
