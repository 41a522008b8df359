"""The logits processor of vLLM's V1 runner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    LogitsProcessor,
    MoveDirectionality,
)

from rgtg_fast.config import Guidance
from rgtg_fast.errors import RGTGError
from rgtg_fast.integrations.vllm_start import (
    end_rows,
    guidance_here,
    logger,
    start_scorer,
    stop_token,
)


@dataclass(eq=False)
class _Row:
    """A guided request of the batch.

    Attributes:
        prompt: its token ids.
        answer: the tokens decided so far: vLLM's own list, which grows.
        guidance: its guidance, without the weights of a mixture.
        weights: these.
        stop: the token that ends it.
        request: its handle in the scorer, None before its first step.
        error: why it cannot be guided, empty while it can.
    """

    prompt: list[int]
    answer: list[int]
    guidance: Guidance
    weights: tuple[float, ...] | None
    stop: int
    request: int | None = None
    error: str = ""


class RewardGuideV1(LogitsProcessor):
    """Guides rows of a batch that vLLM orders anew in every step (`RewardGuide` makes it).

    The rewards follow from the prompt and the tokens that vLLM has decided alone: a preempted request, a chunked
    prompt and a row that moved need nothing else. A row in the middle of its prompt is guided too; vLLM discards what
    it draws from it.

    Args:
        vllm_config: the engine's configuration.
        device: where the logits are.
        is_pin_memory: unused.

    Raises:
        RGTGError: the settings, the reward model or the server do not fit each other.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.settings, self.scorer = start_scorer(vllm_config, device)
        self._rows: dict[int, _Row] = {}
        # Rows of the last step and which of their rewards are NaN, read when the device has finished.
        self._checked: tuple[list[_Row], torch.Tensor] | None = None

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows the batch.

        Args:
            batch_update: vLLM's `BatchUpdate`: what was removed, added and moved; None for nothing.
        """
        self._report()
        if batch_update is None or self.scorer is None:
            return
        for index in batch_update.removed:
            self._put(index, None)
        for index, params, prompt, answer in batch_update.added:
            self._put(index, self._row(params, prompt, answer))
        for source, target, direction in batch_update.moved:
            moved = self._rows.pop(source, None)
            if direction is MoveDirectionality.SWAP:
                other = self._rows.pop(target, None)
                self._put(source, other)
            self._put(target, moved)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """log π + β·r in the rows of guided requests.

        Args:
            logits: [R, V] float32, a row for each request of the batch.

        Returns:
            logits: [R, V] float32; rows of other requests are the same bits.
        """
        found = sorted(self._rows.items())
        guided = [(index, row) for index, row in found if self._follow(row)]
        failed = [(index, row) for index, row in found if row.error]
        if guided:
            indices, rows = [index for index, _ in guided], [row for _, row in guided]
            whole = len(indices) == len(logits)
            scored = self._guide(rows, logits if whole else logits[indices])
            # Without a check on the host a row with a NaN reward is NaN as a whole.
            bad = scored[:, 0].isnan()
            end_rows(scored, bad, [row.stop for row in rows])
            self._checked = rows, bad
            if whole:
                return scored
            logits[indices] = scored
        if failed:
            indices = [index for index, _ in failed]
            ended = torch.ones(len(indices), dtype=torch.bool, device=logits.device)
            logits[indices] = end_rows(logits[indices], ended, [row.stop for _, row in failed])
        return logits

    def _row(self, params: Any, prompt: list[int] | None, answer: list[int]) -> _Row | None:
        """A request that has come; None where it is not guided."""
        assert self.scorer is not None
        guidance, error = guidance_here(self.settings, params)
        if guidance is None:
            return None
        # More candidates than tokens are all of the tokens.
        settings = replace(guidance, weights=None, k=min(guidance.k, self.scorer.vocabulary))
        row = _Row(prompt or [], answer, settings, guidance.weights, stop_token(params, self.scorer.eos_ids))
        if error:
            self._fail(row, error)
        return row

    def _put(self, index: int, row: _Row | None) -> None:
        """Row `index` of the batch is another request now, None for one that is not guided."""
        before = self._rows.pop(index, None)
        if before is not None and before.request is not None:
            assert self.scorer is not None
            self.scorer.drop(before.request)
        if row is not None:
            self._rows[index] = row

    def _follow(self, row: _Row) -> bool:
        """Gives the scorer the tokens that were decided; False where the request cannot be guided."""
        assert self.scorer is not None
        if row.error:
            return False
        try:
            if row.answer and row.answer[-1] < 0:
                raise RGTGError(
                    "the server has not yet said which token it chose: report this with its version"
                )
            if row.request is None:
                row.request = self.scorer.add(row.prompt, row.answer, row.weights)
            else:
                self.scorer.advance(row.request, row.answer)
        except RGTGError as error:
            self._fail(row, error)
            return False
        return True

    def _guide(self, rows: list[_Row], logits: torch.Tensor) -> torch.Tensor:
        """New logits of rows; NaN for a request that cannot be guided."""
        assert self.scorer is not None
        requests = [row.request for row in rows if row.request is not None]
        guidance = [row.guidance for row in rows]
        try:
            return self.scorer.guide(requests, logits, guidance, check=False)
        except RGTGError as error:
            if len(rows) == 1:
                self._fail(rows[0], error)
                return torch.full_like(logits, torch.nan)
        # One request's fault is not the others'.
        return torch.cat([self._guide([row], logits[at : at + 1]) for at, row in enumerate(rows)])

    def _report(self) -> None:
        """Logs the requests that ended in the last step since no candidate had a score."""
        if self._checked is None:
            return
        (rows, bad), self._checked = self._checked, None
        for row, is_bad in zip(rows, bad.tolist(), strict=True):
            if is_bad and not row.error:
                self._fail(
                    row,
                    "no usable reward (NaN or +inf: check the reward model's weights and dtype, try float32), or no "
                    "token left to choose (a grammar or mask of the request)",
                )

    def _fail(self, row: _Row, error: object) -> None:
        """Ends a request, with the reason in the server's log."""
        row.error = str(error)
        logger.error(
            "rgtg_fast: a request with %d prompt tokens ends after %d answer tokens: %s",
            len(row.prompt),
            len(row.answer),
            error,
        )
