"""Packs preference pairs into rows and runs a causal model on them: every prefix of both answers in one forward.

A row is [x¹ | y¹ʷ | y¹ˡ | x² | y²ʷ | y²ˡ | …]. Each answer of a pair attends to the pair's prompt and to itself, never
to the other answer or to another pair, and its positions continue those of the prompt. Each token's hidden state is
therefore that of a forward over x∘y alone: the loss of arXiv 2406.07780 without one row per prefix.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.attention import NAME as PREFIX
from rgtg_fast.models.attention import PACKED
from rgtg_fast.models.rope import longrope_length
from rgtg_fast.training.data import TokenizedPair
from rgtg_fast.training.packed_attention import Packing


def cost(pair: TokenizedPair, eos_padding: bool = False) -> int:
    """Tokens that a pair takes in a row: prompt, chosen and rejected answer.

    Args:
        eos_padding: the shorter answer is padded to the longer one's length.
    """
    chosen, rejected = len(pair.chosen_ids), len(pair.rejected_ids)
    answers = 2 * max(chosen, rejected) if eos_padding else chosen + rejected
    return len(pair.prompt_ids) + answers


def pack(pairs: Sequence[TokenizedPair], budget: int, eos_padding: bool = False) -> list[list[int]]:
    """Packs pairs into rows, best-fit decreasing: the longest first, each into the fullest row that it fits.

    Args:
        pairs: the pairs to pack.
        budget: most tokens of a row.
        eos_padding: as in `cost`.

    Returns:
        Indices into `pairs`, one list per row; every pair is in exactly one row.

    Raises:
        RGTGError: a pair is longer than the budget.
    """
    costs = [cost(pair, eos_padding) for pair in pairs]
    rows: list[list[int]] = []
    # (free tokens, row), ascending: the first that is large enough is the fullest row.
    free: list[tuple[int, int]] = []
    for index in sorted(range(len(pairs)), key=lambda i: -costs[i]):
        size = costs[index]
        if size > budget:
            raise RGTGError(
                f"pair {pairs[index].index} has {size} tokens and a row holds {budget}: "
                f"use a token budget of at least {max(costs)} or a smaller max_length"
            )
        place = bisect.bisect_left(free, (size, -1))
        if place == len(free):
            left, row = budget, len(rows)
            rows.append([])
        else:
            left, row = free.pop(place)
        rows[row].append(index)
        bisect.insort(free, (left - size, row))
    return rows


@dataclass(frozen=True)
class PackedBatch:
    """Rows of packed pairs.

    Attributes:
        input_ids: [R, S] int64, padded on the right.
        position_ids: [R, S] int64; those of both answers continue the prompt's, those of padding are 0.
        spans: [N, 5] int64: row, start of the prompt, start of the chosen answer, start of the rejected one, end. The
            pairs of a row follow one another from column 0.
        pairs: indices of the N pairs in the sequence that `collate` was given.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    spans: torch.Tensor
    pairs: list[int]

    @property
    def packing_efficiency(self) -> float:
        """Share of the R·S tokens that are not padding."""
        return float((self.spans[:, 4] - self.spans[:, 1]).sum()) / self.input_ids.numel()

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            spans=self.spans.to(device),
        )


def collate(
    pairs: Sequence[TokenizedPair],
    rows: Sequence[Sequence[int]],
    pad_id: int,
    length: int | None = None,
    eos_padding: bool = False,
) -> PackedBatch:
    """Makes a batch of packed pairs.

    Args:
        pairs: all pairs.
        rows: indices into `pairs`, one sequence per row, as `pack` returns them.
        pad_id: id of the tokens after a row's last pair.
        length: S; None for the longest row.
        eos_padding: pad the shorter answer with EOS, its own last token, to the longer one's length, as PARGS's
            published data do.

    Raises:
        RGTGError: no rows, or a row longer than `length`.
    """
    used = [sum(cost(pairs[i], eos_padding) for i in row) for row in rows]
    if not used or not min(used):
        raise RGTGError("there is no pair in a row: pass rows of at least one pair each")
    size = max(used) if length is None else length
    if max(used) > size:
        raise RGTGError(f"a row has {max(used)} tokens and length={size}: pack with this budget")
    input_ids = torch.full((len(rows), size), pad_id, dtype=torch.long)
    position_ids = torch.zeros(len(rows), size, dtype=torch.long)
    spans: list[tuple[int, int, int, int, int]] = []
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            prompt, chosen, rejected = pairs[i].prompt_ids, pairs[i].chosen_ids, pairs[i].rejected_ids
            if eos_padding:
                longer = max(len(chosen), len(rejected))
                chosen = [*chosen, *chosen[-1:] * (longer - len(chosen))]
                rejected = [*rejected, *rejected[-1:] * (longer - len(rejected))]
            first, second = start + len(prompt), start + len(prompt) + len(chosen)
            end = second + len(rejected)
            input_ids[r, start:end] = torch.tensor([*prompt, *chosen, *rejected])
            position_ids[r, start:second] = torch.arange(second - start)
            position_ids[r, second:end] = torch.arange(len(prompt), len(prompt) + len(rejected))
            spans.append((r, start, first, second, end))
            start = end
    return PackedBatch(input_ids, position_ids, torch.tensor(spans), [i for row in rows for i in row])


def answer_positions(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions of the answers' tokens in the rows.

    Returns:
        rows: [M] int64, of all M answer tokens in the order chosen_0, rejected_0, chosen_1, …
        columns: [M] int64.
        offsets: [2N + 1] int64, where each answer begins among the M tokens, and M.
    """
    row, _, chosen, rejected, end = batch.spans.unbind(1)
    starts = torch.stack([chosen, rejected], 1).flatten()
    lengths = torch.stack([rejected - chosen, end - rejected], 1).flatten()
    offsets = functional.pad(lengths.cumsum(0), (1, 0))
    rows = row.repeat_interleave(2).repeat_interleave(lengths)
    within = torch.arange(len(rows), device=rows.device) - offsets[:-1].repeat_interleave(lengths)
    return rows, starts.repeat_interleave(lengths) + within, offsets


def preceding_positions(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions of the answers' tokens in the rows, and of the tokens from which they are predicted.

    Returns:
        rows, columns: [M] int64, as in `answer_positions`.
        before: [M] int64, columns of the preceding tokens; the first token of either answer follows the prompt's last.
    """
    rows, columns, offsets = answer_positions(batch)
    before = columns - 1
    before[offsets[:-1]] = (batch.spans[:, 2] - 1).repeat_interleave(2)
    return rows, columns, before


class Rows(Dataset[tuple[list[int], bool]]):
    """Packed rows, indices of their pairs each. A key is a row's number and whether the row counts."""

    def __init__(self, rows: list[list[int]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[list[int], bool]:
        return self.rows[key[0]], key[1]


class RowBatches(Sampler[list[tuple[int, bool]]]):
    """One process's share of shuffled rows; all processes together see the batches that one process would.

    Rows that fill up the last batch do not count.

    Args:
        rows: number of rows.
        size: rows of a batch on one process.
        seed: seed of the order.
        epoch: returns the epoch whose order to use.
        process: number of this process.
        processes: number of processes.
    """

    def __init__(
        self, rows: int, size: int, seed: int, epoch: Callable[[], int], process: int, processes: int
    ):
        self.rows, self.size, self.seed, self.epoch = rows, size, seed, epoch
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return math.ceil(self.rows / (self.size * self.processes))

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch())
        order = [(row, True) for row in torch.randperm(self.rows, generator=generator).tolist()]
        step = self.size * self.processes
        order += [(order[0][0], False)] * (len(self) * step - self.rows)
        for start in range(self.process * self.size, len(order), step):
            yield order[start : start + self.size]


def use_packed_attention(model: nn.Module) -> None:
    """Makes the model's layers call `packed_attention`; forwards without `packing` are unchanged.

    Raises:
        RGTGError: the model's attention cannot be replaced.
    """
    inner = pretrained(model)
    if not inner._supports_attention_backend:
        raise RGTGError(f"{type(inner).__name__} cannot run packed rows: its attention cannot be replaced")
    inner.set_attn_implementation(PACKED)


def pretrained(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a wrapper such as peft's or DistributedDataParallel, or the model itself."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise RGTGError(f"{type(model).__name__} contains no transformers model: pass one")


def forward_arguments(trunk: PreTrainedModel, batch: PackedBatch) -> dict[str, Any]:
    """Keyword arguments of a trunk's forward over a packed batch, except `input_ids` or `inputs_embeds`.

    Raises:
        RGTGError: a text is so long that longrope computes all texts of the batch by its frequencies.
    """
    # The model's owner may have set another attention since, which would ignore the pairs' boundaries.
    if trunk.config._attn_implementation not in (PACKED, PREFIX):
        use_packed_attention(trunk)
    packing = Packing(batch.spans, (batch.input_ids.shape[0], batch.input_ids.shape[1]))
    original = longrope_length(trunk.config.get_text_config())
    if original is not None and packing.longest > original:
        raise RGTGError(
            f"a prompt with its answer has {packing.longest} tokens and the longrope of {type(trunk).__name__} changes "
            f"its frequencies beyond {original}, for all texts of a packed batch: use max_length={original}"
        )
    return {
        "position_ids": batch.position_ids,
        # transformers takes any 4-D mask as final and builds no [S, S] mask; packed_attention does not read it.
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=trunk.dtype, device=batch.input_ids.device),
        "packing": packing,
        "use_cache": False,
    }


def packed_hidden(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Hidden states [R, S, E] after the final norm.

    Args:
        model: prepared by `use_packed_attention`; may be wrapped.
        batch: packed pairs.
    """
    trunk: Any = pretrained(model).base_model
    return trunk(input_ids=batch.input_ids, **forward_arguments(trunk, batch)).last_hidden_state


def packed_rewards(model: nn.Module, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards r(x, y_{1:i}) of every prefix of both answers of all pairs.

    Returns:
        rewards: [M], float32 or the model's wider dtype, in the order chosen_0, rejected_0, chosen_1, … An answer's
            last reward is that of the whole answer.
        offsets: [2N + 1] int64, where each answer begins, and M.

    Raises:
        RGTGError: no score head with one label.
    """
    head = dict(pretrained(model).named_children()).get("score")
    if head is None:
        raise RGTGError(
            f"{type(pretrained(model)).__name__} has no `score` head over a causal trunk: "
            "use AutoModelForSequenceClassification with num_labels=1"
        )
    hidden = packed_hidden(model, batch)
    rows, columns, offsets = answer_positions(batch)
    rewards = head(hidden[rows, columns])
    if rewards.shape[-1] != 1:
        raise RGTGError(
            f"the score head gives {rewards.shape[-1]} labels and a reward is 1: use num_labels=1"
        )
    rewards = rewards[:, 0]
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32)), offsets
