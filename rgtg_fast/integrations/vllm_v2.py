"""The logits processor of vLLM's V2 runner, whose token history is on the device."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    LogitsProcessor,
)

from rgtg_fast.errors import RGTGError
from rgtg_fast.integrations.vllm_start import logger
from rgtg_fast.integrations.vllm_v1 import RewardGuideV1, _Row


class RewardGuideV2(LogitsProcessor):
    """Guides requests by their slots, which the runner recycles without telling (`RewardGuide` makes it).

    A slot keeps its request's rewards until another request takes it, so that the scorer needs as many requests as the
    runner has slots. The tokens that were decided are read from the device with one copy a step.

    Args:
        vllm_config: the engine's configuration.
        req_states: vLLM's `LogitsProcRequestState`: each slot's tokens and lengths.

    Raises:
        RGTGError: the settings, the reward model or the server do not fit each other.
    """

    def __init__(self, vllm_config: Any, req_states: Any):
        if vllm_config.speculative_config is not None:
            error = RGTGError(
                "the V2 runner gives draft tokens rows of their own: start the server without speculative decoding"
            )
            logger.error("rgtg_fast: %s", error)
            raise error
        # It guides rows of a batch; here each step has rows of its own.
        self._guide = RewardGuideV1(vllm_config, req_states.device, False)
        self._states = req_states
        self._slots: dict[int, _Row] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """A request takes a slot; whether it is guided.

        Args:
            req_idx: the slot, whose last request has left.
            sampling_params: vLLM's `SamplingParams`.
        """
        scorer, before = self._guide.scorer, self._slots.pop(req_idx, None)
        if scorer is None:
            return False
        if before is not None and before.request is not None:
            scorer.drop(before.request)
        row = self._guide._row(sampling_params, [], [])
        if row is not None:
            self._slots[req_idx] = row
        return row is not None

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """log π + β·r in the rows of guided requests.

        Args:
            logits: [R, V] float32, a row for each request of the batch.
            ctx: vLLM's `LogitsContext`: each row's slot and position.

        Returns:
            [R, V] float32; rows of other requests are the same bits.
        """
        slots = ctx.idx_mapping_np.tolist()
        if len(slots) != len(logits):
            # A rank that samples a part of the batch.
            slots = ctx.expanded_idx_mapping.tolist()
        rows = [row for row, slot in enumerate(slots) if slot in self._slots]
        if not rows:
            return logits
        self._guide._report()
        self._guide._rows = self._decided(rows, [slots[row] for row in rows], ctx)
        return self._guide.apply(logits)

    def _decided(self, rows: list[int], slots: list[int], ctx: Any) -> dict[int, _Row]:
        """The guided requests by row, with the tokens that were decided; without those in the middle of a prompt.

        Args:
            rows: of the step.
            slots: of these.
            ctx: as in `apply`.
        """
        tokens, total = self._states.all_token_ids.gpu, self._states.total_len.gpu
        at = torch.tensor(slots, device=total.device)
        lengths = total[at]
        position = ctx.pos[torch.tensor(rows, device=total.device)]
        # Lengths, newest tokens and positions at once: each copy waits for the device.
        read = torch.stack([lengths, tokens[at, lengths.long() - 1], position.to(lengths)]).tolist()
        found = {}
        for row, slot, length, newest, place in zip(rows, slots, *read, strict=True):
            if place + 1 < length:
                continue  # vLLM discards what it draws from this row
            state = self._slots[slot]
            known = len(state.prompt) + len(state.answer)
            if state.prompt and length == known + 1:
                state.answer.append(newest)
            elif length != known:
                # A request that has come, or has come back with the tokens it had.
                whole, prompt = tokens[slot, :length].tolist(), int(self._states.prompt_len.np[slot])
                state.prompt, state.answer = whole[:prompt], whole[prompt:]
            found[row] = state
        return found
