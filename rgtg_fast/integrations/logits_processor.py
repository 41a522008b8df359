"""A logits processor for transformers' `generate`, for programs that keep a generation loop of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessor

from rgtg_fast.config import Guidance, whole
from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.rewards.parse import RewardLike
from rgtg_fast.scorer import RequestScorer


class RewardGuidedLogitsProcessor(LogitsProcessor):
    """Turns a step's logits into log π + β·r on each row's candidates, -inf elsewhere.

    Works in greedy search, sampling and beam search, with batches and padding on the left. `generate` samples from the
    result; its temperature, top-k and top-p apply after guidance. The rewards follow each row's tokens, beams too. The
    greedy tokens are those of `RewardGuidedDecoder` with `Guidance(temperature=0)`, which is faster.

    One object serves one `generate` call at a time. A call is taken for a new one where its rows do not continue those
    of the last; `begin` says so explicitly.

    Args:
        scorer: the reward, bound to the model that generates.
        guidance: k, β and the support; the temperature is `generate`'s.
        pad_token_id: the token that prompts are padded with; by default the tokenizer's.

    Raises:
        RGTGError: a temperature, or an argument of another type. In a step: `inputs_embeds` in place of tokens, more
            rows than the scorer has, padding on the right or that cannot be told from the prompt, or rows that do not
            continue (assisted decoding).

    Example:
        >>> guide = RewardGuidedLogitsProcessor.from_pretrained((model, tokenizer), "reward")  # doctest: +SKIP
        >>> model.generate(**inputs, logits_processor=[guide])  # doctest: +SKIP
    """

    def __init__(
        self, scorer: RequestScorer, guidance: Guidance | None = None, pad_token_id: int | None = None
    ):
        if not isinstance(scorer, RequestScorer):
            raise RGTGError(
                f"scorer={shown(scorer)} is not a RequestScorer: use RewardGuidedLogitsProcessor."
                "from_pretrained((model, tokenizer), reward)"
            )
        guidance = Guidance() if guidance is None else guidance
        if not isinstance(guidance, Guidance):
            raise RGTGError(f"guidance={shown(guidance)} is not a Guidance: pass Guidance(k=10, beta=1.0)")
        if guidance.temperature != 1:
            raise RGTGError(
                f"temperature={guidance.temperature:g} belongs to generate: pass temperature or do_sample=False there"
            )
        self._scorer, self._weights = scorer, guidance.weights
        self._guidance = replace(guidance, weights=None)
        tokenizer = scorer.tokenizer
        own = None if tokenizer is None else tokenizer.pad_token_id
        self._pad = own if pad_token_id is None else whole("pad_token_id", pad_token_id, 0, 0)
        self._bos = None if tokenizer is None else tokenizer.bos_token_id
        self._mask: torch.Tensor | None = None
        self._rows: list[int] = []  # handles
        self._answers: list[list[int]] = []
        self._prompt_length = 0
        self._ids = torch.empty(0, 0, dtype=torch.int64)  # [B, T] of the last step, on the host

    @classmethod
    def from_pretrained(
        cls,
        lm: Any,
        reward: RewardLike,
        guidance: Guidance | None = None,
        max_rows: int = 8,
        pad_token_id: int | None = None,
        **settings: Any,
    ) -> RewardGuidedLogitsProcessor:
        """Loads the reward.

        Args:
            lm: the (model, tokenizer) that generates, or its path or hub id.
            reward: as in `RewardGuidedDecoder.from_pretrained`.
            guidance: as in the class.
            max_rows: rows at most: prompts × beams or returned sequences.
            pad_token_id: as in the class.
            settings: further ones of `RequestScorer.from_pretrained`: device, dtype, max_length, engine, label,
                trust_remote_code, reward_weights.

        Raises:
            RGTGError: an argument or model that cannot work.
        """
        scorer = RequestScorer.from_pretrained(lm, reward, max_requests=max_rows, **settings)
        return cls(scorer, guidance, pad_token_id)

    def begin(self, attention_mask: torch.Tensor | None = None) -> None:
        """The next step is the first of a new `generate` call.

        Args:
            attention_mask: [B, T] of the prompts, for a tokenizer that pads with a token that prompts begin with.
        """
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            raise RGTGError(
                f"attention_mask={shown(attention_mask)} is not a tensor: pass inputs['attention_mask']"
            )
        for handle in self._rows:
            self._scorer.drop(handle)
        self._rows, self._answers, self._mask = [], [], attention_mask
        self._ids = self._ids.new_empty(0, 0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Guides one step.

        Args:
            input_ids: [B, T] tokens so far.
            scores: [B, V] logits or log-probabilities.

        Returns:
            [B, V] in the dtype of `scores`.
        """
        ids = input_ids.cpu()
        if not ids.shape[1]:
            raise RGTGError(
                "generate was called with inputs_embeds, which rewards cannot read: pass input_ids"
            )
        sources = self._sources(ids)
        if sources is None:
            self._begin_rows(ids)
        else:
            self._answers = [
                [*self._answers[source], token]
                for source, token in zip(sources, ids[:, -1].tolist(), strict=True)
            ]
            for handle, answer in zip(self._rows, self._answers, strict=True):
                self._scorer.advance(handle, answer)
        self._ids = ids
        return self._scorer.guide(self._rows, scores, self._guidance).to(scores.dtype)

    def _sources(self, ids: torch.Tensor) -> list[int] | None:
        """The row of the last step that each row continues by a token; None for a new call.

        Raises:
            RGTGError: rows of the same prompts that do not continue.
        """
        last, length = self._ids, self._prompt_length
        if not self._rows or len(ids) != len(last) or ids.shape[1] <= length:
            return None
        if not torch.equal(ids[:, :length], last[:, :length]):
            return None
        if ids.shape[1] == last.shape[1] + 1:
            if torch.equal(ids[:, :-1], last):
                return list(range(len(ids)))
            # Rows with equal prompts may exchange their answers: beams.
            same = (ids[:, None, :-1] == last).all(-1)  # [B, B]
            if bool(same.any(1).all()):
                return same.int().argmax(1).tolist()
        raise RGTGError(
            f"rows of {ids.shape[1]} tokens do not continue those of {last.shape[1]}: assisted decoding is not served; "
            "begin() starts a new call that begins with the same tokens"
        )

    def _begin_rows(self, ids: torch.Tensor) -> None:
        """Takes the rows of a first step for prompts."""
        mask = self._mask
        self.begin()
        if len(ids) > self._scorer.max_requests:
            raise RGTGError(
                f"{len(ids)} rows (prompts × beams or sequences) and max_rows={self._scorer.max_requests}: raise it"
            )
        try:
            for prompt in self._prompts(ids, mask):
                self._rows.append(self._scorer.add(prompt, weights=self._weights))
        except RGTGError:
            self.begin()
            raise
        self._answers, self._prompt_length = [[] for _ in self._rows], ids.shape[1]

    def _prompts(self, ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
        """The prompts without the padding on their left."""
        if mask is None:
            return [self._without_padding(row, tokens) for row, tokens in enumerate(ids.tolist())]
        given = mask.cpu().bool()
        if given.ndim != 2 or given.shape[1] != ids.shape[1] or not len(given) or len(ids) % len(given):
            raise RGTGError(
                f"attention_mask is {list(mask.shape)} and the prompts are {list(ids.shape)}: pass theirs"
            )
        given = given.repeat_interleave(len(ids) // len(given), 0)  # beams and returned sequences
        lengths = given.sum(1)
        if not torch.equal(given, torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]):
            raise RGTGError("attention_mask leaves out tokens on the right or inside: pad on the left")
        return [
            tokens[len(tokens) - length :]
            for tokens, length in zip(ids.tolist(), lengths.tolist(), strict=True)
        ]

    def _without_padding(self, row: int, tokens: list[int]) -> list[int]:
        first = next((place for place, token in enumerate(tokens) if token != self._pad), len(tokens))
        if first and self._pad == self._bos:
            raise RGTGError(
                f"row {row} begins with token {self._pad}, which both pads and begins prompts: call "
                "begin(attention_mask=...) before generate"
            )
        if tokens[-1] == self._pad:
            raise RGTGError(
                f"row {row} ends with the padding token {self._pad}: pad on the left, or, where it belongs to the "
                "prompt, call begin(attention_mask=...) before generate"
            )
        return tokens[first:]
