"""A sequence classifier's rewards of whole texts, each as the model gives it alone, whatever pads a batch."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgtg_fast.errors import RGTGError, one_line
from rgtg_fast.models.heads import SCORE, RewardHead, activation_of, label_index
from rgtg_fast.models.rope import longrope_length
from rgtg_fast.models.runner import Counter

# Two texts of different lengths, to verify that padding changes nothing.
_PROBES = (
    "Yes.",
    "Human: Is 1,234.5 °C hot?\n\nAssistant: It is more than any oven reaches, so do not touch it.",
)

Tokens = dict[str, list[int]]


class Classifier:
    """Rewards of texts under a sequence classifier.

    Texts are padded on the right and masked, whatever the tokenizer and the configuration say. A causal model with a
    `score` head is read at a text's last token. Any other model pools by itself; where a padded batch changes its
    rewards, and where its rope depends on the longest text of a batch, texts are evaluated one by one.

    Args:
        model: the classifier.
        tokenizer: the classifier's.
        title: its name in errors.
        max_length: tokens that a text keeps, its end; None for as many as the model has positions.
        label: name or index of the label whose score is the reward, where the model has several.

    Raises:
        RGTGError: several labels and none chosen, a `max_length` beyond the model's positions, or a model that cannot
            be read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        title: str,
        max_length: int | None,
        label: str | int | None = None,
    ):
        self.model, self.title = model, title
        # The caller's tokenizer is not changed.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.truncation_side = "left"
        self.max_length = self._checked(max_length, usable_positions(model))
        head = dict(model.named_children()).get(SCORE)
        self._head = None if model.config.is_encoder_decoder else head
        # A RewardHead gives the label's score by itself.
        own = isinstance(head, RewardHead)
        self._label = None if own else label_index(model.config, label, title)
        self._activation = None if own else activation_of(model.config, title)
        self._pad = self._padding_id()
        self._types = self._reads_types()
        self._cut = self._together = True
        self._verify()
        self._cut = False  # whether the warning about a cut text was given; the probes give none

    def encode(self, texts: Sequence[str], seconds: Sequence[str] | None, special: bool) -> list[Tokens]:
        """Token ids of texts, without padding; the end of a text that is too long, with one warning.

        Args:
            texts: the texts to encode.
            seconds: second texts of pairs.
            special: whether to add the tokenizer's special tokens.
        """
        encoded = self._tokenize(texts, seconds, special)
        found = []
        for i in range(len(texts)):
            tokens = {name: list(values[i]) for name, values in encoded.items()}
            if self.max_length is not None and len(tokens["input_ids"]) > self.max_length:
                self._warn_cut(len(tokens["input_ids"]))
                tokens = self._end_of(texts[i], None if seconds is None else seconds[i], special, tokens)
            found.append(self._checked_tokens(tokens))
        return found

    def rewards(self, rows: Sequence[Tokens], counter: Counter) -> torch.Tensor:
        """Rewards [N] float32 of encoded texts.

        Args:
            rows: from `encode`.
            counter: counts forwards and tokens.
        """
        parts = [rows] if self._together else [[row] for row in rows]
        counter.calls += len(parts)
        counter.tokens += sum(len(row["input_ids"]) for row in rows)
        return torch.cat([self._forward(part) for part in parts])

    # ---- the model ------------------------------------------------------------------------------------------------

    def _forward(self, rows: Sequence[Tokens]) -> torch.Tensor:
        arguments, last = self._padded(rows)
        try:
            if self._head is None:
                logits = self.model(**arguments).logits
            else:
                states = self.model.base_model(**arguments, use_cache=False).last_hidden_state
                logits = self._head(states[torch.arange(len(rows), device=states.device), last])
        except torch.OutOfMemoryError as error:
            raise RGTGError(
                f"{self.title} has no memory for {len(rows)} texts at once: use a smaller batch_size"
            ) from error
        except Exception as error:  # a family's own code may raise anything
            reason = one_line(error)
            raise RGTGError(
                f"{self.title} cannot read a text of {int(last.max()) + 1} tokens ({reason}): "
                "set a smaller max_length, or use another reward model"
            ) from error
        if self._label is not None and logits.ndim == 2:
            logits = logits[:, self._label : self._label + 1]
        if logits.shape != (len(rows), 1):
            raise RGTGError(
                f"{self.title} gives scores of shape {tuple(logits.shape)} for {len(rows)} texts: use a reward model "
                "with one score for a text"
            )
        if self._activation is not None:
            logits = self._activation(logits.double())
        return logits.squeeze(-1).float()

    def _padded(self, rows: Sequence[Tokens]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The model's arguments, padded on the right, and the index of each text's last token [N]."""
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        width = int(lengths.max())
        arguments = {"attention_mask": (torch.arange(width) < lengths.unsqueeze(-1)).long()}
        for name, filler in (("input_ids", self._pad), ("token_type_ids", 0)):
            if name == "input_ids" or (self._types and name in rows[0]):
                values = [row[name] + [filler] * (width - len(row[name])) for row in rows]
                arguments[name] = torch.tensor(values)
        device = self.model.device
        return {name: value.to(device) for name, value in arguments.items()}, (lengths - 1).to(device)

    @torch.inference_mode()
    def _verify(self) -> None:
        """Compares a padded batch with its texts alone; with a `score` head the two must agree."""
        rows = [self._plain_probe(row) for row in self.encode(_PROBES, None, special=True)]
        head, self._head = self._head, None
        alone = torch.cat([self._forward([row]) for row in rows])
        self._head = head
        if not alone.isfinite().all():
            raise RGTGError(
                f"{self.title} gives NaN or infinity for a short text: check its weights and dtype (float16 overflows: "
                "try bfloat16 or float32)"
            )
        try:
            together = self._forward(rows)
        except RGTGError:
            together = torch.full_like(alone, torch.nan)
        # Rounding depends on the shape of a batch: the tolerance is relative to the rewards.
        eps = max(torch.finfo(self.model.dtype).eps, torch.finfo(torch.float32).eps)
        off = float((together - alone).abs().max() / alone.abs().max().clamp_min(0.1))
        # An encoder-decoder pools at the last end-of-sequence token and needs equally many in all texts of a batch.
        self._together = off <= min(1024 * eps, 0.25) and not self.model.config.is_encoder_decoder
        if self._head is not None:
            self._together = True
            if not off <= max(1024 * eps, 0.01):
                raise RGTGError(
                    f"{self.title} does not read a text at its last token by its `score` head: "
                    "use another reward model"
                )
        # Longrope would compute all texts of a batch by the length of the longest.
        original = longrope_length(self.model.config.get_text_config())
        if original is not None and (self.max_length is None or self.max_length > original):
            self._together = False

    def _plain_probe(self, tokens: Tokens) -> Tokens:
        """A causal model's probe without the padding token, by which the model's own forward finds the last token."""
        if self._head is None:
            return tokens
        pad = self.model.config.get_text_config().pad_token_id
        known = self._embeddings
        ids = [(token + 1) % known if token == pad else token for token in tokens["input_ids"]]
        return {**tokens, "input_ids": ids}

    @property
    def _embeddings(self) -> int:
        try:
            table: Any = self.model.get_input_embeddings()
        except NotImplementedError:  # a model of characters has no table
            return sys.maxsize
        return int(table.weight.shape[0])

    def _padding_id(self) -> int:
        """A token that has an embedding; the attention mask hides it."""
        config = self.model.config.get_text_config()
        given = self.tokenizer.pad_token_id, getattr(config, "pad_token_id", None)
        return next((int(i) for i in cast("Any", given) if i is not None and 0 <= i < self._embeddings), 0)

    def _reads_types(self) -> bool:
        """Whether the model distinguishes the two texts of a pair by token types."""
        if self._head is not None or "token_type_ids" not in inspect.signature(self.model.forward).parameters:
            return False
        return getattr(self.model.config.get_text_config(), "type_vocab_size", 2) > 1

    # ---- texts ------------------------------------------------------------------------------------------------------

    def _tokenize(
        self, texts: Sequence[str], seconds: Sequence[str] | None, special: bool, **settings: Any
    ) -> dict[str, list[list[int]]]:
        tokenize = cast("Callable[..., dict[str, list[list[int]]]]", self.tokenizer)
        encoded = tokenize(
            list(texts),
            None if seconds is None else list(seconds),
            add_special_tokens=special,
            return_special_tokens_mask=special,
            verbose=False,
            **settings,
        )
        names = ("input_ids", "token_type_ids", "special_tokens_mask")
        return {name: encoded[name] for name in names if name in encoded}

    def _end_of(self, text: str, second: str | None, special: bool, tokens: Tokens) -> Tokens:
        """A long text without its beginning, but with the special tokens around it."""
        assert self.max_length is not None
        if special:
            seconds = None if second is None else [second]
            cut = self._tokenize([text], seconds, special, truncation=True, max_length=self.max_length)
            return {name: list(values[0]) for name, values in cut.items()}
        first = tokens["input_ids"][0]
        frame = 1 if first in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else 0
        return {
            name: values[:frame] + values[len(values) - self.max_length + frame :]
            for name, values in tokens.items()
        }

    def _checked_tokens(self, tokens: Tokens) -> Tokens:
        """Token ids that the model can read, with one beginning of text where the text itself begins with one too."""
        added, ids = tokens.pop("special_tokens_mask", []), tokens["input_ids"]
        if added[:2] == [1, 0] and ids[0] == ids[1]:
            tokens = {name: values[1:] for name, values in tokens.items()}
        if not ids or (self.max_length is not None and len(ids) > self.max_length):
            raise RGTGError(
                f"{self.title} gets a text of {len(ids)} tokens, to be read as 1 to {self.max_length}: check max_length"
            )
        outside = next((token for token in ids if not 0 <= token < self._embeddings), None)
        if outside is not None:
            raise RGTGError(
                f"the tokenizer of {self.title} gives token id {outside} and the model has embeddings "
                f"for {self._embeddings}: "
                "use the tokenizer that the model was trained with"
            )
        return tokens

    def _checked(self, given: int | None, usable: int | None) -> int | None:
        if given is None:
            return usable
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        if isinstance(given, bool) or not isinstance(given, int) or given <= special:
            raise RGTGError(f"max_length={given!r} leaves no tokens for a text: use for example 512")
        if usable is not None and given > usable:
            raise RGTGError(
                f"max_length={given} exceeds the {usable} positions of {self.title}: use max_length <= {usable}"
            )
        return given

    def _warn_cut(self, length: int) -> None:
        if not self._cut:
            self._cut = True
            warnings.warn(
                f"{self.title} reads {self.max_length} tokens of a text and one has {length}: the beginnings of long "
                "texts are left out",
                stacklevel=2,
            )


def usable_positions(model: PreTrainedModel) -> int | None:
    """Tokens of a text for which the model has positions, None where positions are relative and any length works."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (
            last == "wpe" or ("position" in last and "relative" not in name)
        ):
            # RoBERTa and similar models count positions from after the padding's.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - max(unused, int(getattr(module, "offset", 0))))
    return min((int(limit) for limit in limits if limit is not None and limit > 0), default=None)
