"""A causal transformer with its prefix cache: prefill a slot, step all rows, commit what was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter
from rgtg_fast.models.attached import Attached
from rgtg_fast.models.device import to_device
from rgtg_fast.models.fused_projections import fuse_projections
from rgtg_fast.models.heads import Head, RewardHead, scores_of
from rgtg_fast.models.int8 import Int8Linear
from rgtg_fast.models.kv_cache import PrefixCache, Slots
from rgtg_fast.models.layers import choose_layers
from rgtg_fast.models.lora import LowRankRows
from rgtg_fast.models.model_state import ModelSnapshot
from rgtg_fast.models.rope import RowRope
from rgtg_fast.models.split_cache import SplitCache
from rgtg_fast.models.support import cache_geometry, layer_windows
from rgtg_fast.models.verification import OUTPUTS, verify_variant


@dataclass
class Counter:
    """Forwards of a model and tokens through it, prompts apart from decode steps."""

    calls: int = 0
    tokens: int = 0
    prompt_tokens: int = 0


class ModelRunner:
    """One transformers model, its head and its PrefixCache.

    Rows live in slots 0..n-1, or in those that a step names. `prefill` fills one slot's prefix, `step` runs S undecided
    tokens per row, `commit` appends the chosen one. No key or value is computed twice.

    A reward model that is an adapter on this model can share its forward (`attach`): from the first layer that an
    adapter changes on, each row runs once more under that adapter.

    Args:
        model: a causal model with a head: `lm_head` (language model) or `score` (reward model).
        head: the head's linear layer, or a reward model's head of another kind.
        engine: `"auto"`, `"native"`, `"triton"` or `"transformers"`.
        limit: tokens that the model's context holds.

    Attributes:
        logit_softcap: c, where a language model's own logits are c·tanh(output of the head / c); None for plain ones.
        windows: whether layers have sliding windows shorter than a row, which `verify` has compared.
        shared_forward: whether steps of this run execute the candidates themselves, because an attached adapter scores
            them. The state after the chosen one then gives the next token's logits, and no token is run again.
        prompt_contexts: rows of this model for each prompt, the prompt's own first (contrastive prompts: 3). Attached
            adapters read the first alone.
        compiled: whether steps run compiled blocks.
        rope: frequencies that depend on a row's length; None where they do not.
    """

    def __init__(self, model: PreTrainedModel, head: Head, engine: str, limit: int):
        self.model, self.limit = model, limit
        self.head: Any = head
        # A RewardHead keeps a dtype of its own, and rounded weights are integers.
        odd = isinstance(head, (RewardHead, Int8Linear))
        weight: Any = model.get_input_embeddings().weight if odd else head.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.engine, self.layers = choose_layers(model, engine)
        self.rope = RowRope.of(model.base_model, limit)
        self._snapshot = ModelSnapshot(model, head)
        if self.engine != "transformers" or self.device.type != "cpu":
            self._snapshot.pin()
        config: Any = model.config.get_text_config()
        language = head is model.get_output_embeddings()
        self.logit_softcap = getattr(config, "final_logit_softcapping", None) if language else None
        self.geometry = cache_geometry(model)
        self.counter = Counter()
        self.shared_forward = self.compiled = self.windows = False
        self.prompt_contexts = 1
        self._adapters: list[Adapter] = []
        self.cache = self.new_cache(self.dtype)
        self._rows: LowRankRows | None = None
        # States [B, branches, S, E] of the last step's tokens; with shared_forward, [slots, branches, E] of the newest.
        self._stepped = self._states = self._newest = torch.empty(0)
        # The host's copy of cache.lengths, so that the host never waits for the device.
        self._lengths: list[int] = []
        # The prompt that each slot's prefix begins with (`begin`).
        self._prompts: list[Sequence[int]] = []
        self._encoded: list[int] = []
        # The slots of the last step's rows, None for the first ones.
        self._slots: Slots | None = None

    @property
    def name(self) -> str:
        """The model's path or hub id, or its class where it has none."""
        return self.model.config._name_or_path or type(self.model).__name__

    @property
    def step_bytes_per_token(self) -> int:
        """Bytes that an undecided token takes in a step: its keys and values, and about what a block computes."""
        config: Any = self.model.config.get_text_config()
        inner = int(getattr(config, "intermediate_size", None) or 4 * self.head.in_features)
        numbers = 4 * self.head.in_features + 2 * inner
        return self.cache.row_bytes(1) + numbers * self.branches * max(4, self.dtype.itemsize)

    # ---- adapters that share the forward ----------------------------------------------------------------------------

    @property
    def branches(self) -> int:
        """Rows of a slot above the fork: the model's own, and one for each attached adapter."""
        return 1 + len(self._adapters)

    @property
    def fork(self) -> int:
        """The first layer that an attached adapter changes; the number of layers if there is none."""
        forks = [adapter.fork for adapter in self._adapters]
        return min((fork for fork in forks if fork is not None), default=self.geometry[0])

    @torch.inference_mode()
    def attach(self, adapter: Adapter) -> Attached:
        """Runs a reward model's adapter in every forward of this model from now on.

        Args:
            adapter: low-rank corrections on this model's weights. One without any (a head alone) costs no rows.

        Raises:
            RGTGError: the adapter does not fit this model, or its cached forward differs from the uncached one.
        """
        reason = adapter.shape_mismatch(self.model)
        if reason is not None:
            raise RGTGError(f"{reason}: name an adapter of this model")
        if adapter.fork is None:
            return Attached(self, 0)
        self._adapters.append(adapter)
        self._rows = LowRankRows(self.model, self._adapters, self.fork)
        self._snapshot.pin()
        self._snapshot.remember()
        self.layers.adapt(self._adapters, self._rows)
        self.cache = self.new_cache(self.dtype)
        verify_variant(self, self.branches - 1, adapter.name)
        return Attached(self, self.branches - 1)

    def new_cache(self, dtype: torch.dtype) -> PrefixCache | SplitCache:
        """An empty cache for the model's layers and the attached adapters'."""
        windows = layer_windows(self.model.config.get_text_config()) if self.windows else []
        if self.branches == 1 and not windows:
            cache = PrefixCache(*self.geometry, dtype, self.device)
        else:
            cache = SplitCache(*self.geometry, dtype, self.device, self.fork, self.branches, windows)
        cache.windows = self.windows
        return cache

    @property
    def stepped(self) -> torch.Tensor:
        """States [B, branches, S, E] of the last step's tokens."""
        return self._stepped

    def next_logits(self, rows: int) -> torch.Tensor:
        """The head's output [B, V] for the token after each of the first `rows` slots' newest.

        Without `shared_forward` the newest token is the one that was stepped last.
        """
        newest = self._states[:rows] if self.shared_forward else self._stepped[:, :, 0]
        self._newest = newest
        return self.logits(newest[:, 0])

    def newest(self, branch: int) -> torch.Tensor:
        """States [B, E] of a branch, from which this step's next token is decided."""
        return self._newest[:: self.prompt_contexts, branch]

    def candidates(self, branch: int) -> torch.Tensor:
        """States [B, K, E] of a branch after each token of the last step."""
        return self._stepped[:: self.prompt_contexts, branch]

    # ---- a model that its owner changes -----------------------------------------------------------------------------

    def begin_run(self) -> None:
        """Takes over changes of the weights since the last run.

        Raises:
            RGTGError: the model was changed in another way, or its weights are no longer those that an adapter was
                attached to.
        """
        change = self._snapshot.change()
        if change is not None:
            raise RGTGError(f"{self.name} was changed after it was loaded ({change}): make a new decoder")
        if self._adapters:
            if self._snapshot.written():
                raise RGTGError(
                    f"the weights of {self.name} changed after {self._adapters[0].name} was attached to them: make a "
                    "new decoder with share_trunk=False, or train the adapter again"
                )
        else:
            self._snapshot.remember()
        self.layers.refresh()

    @property
    def written(self) -> bool:
        """Whether weights were written to since the last run began."""
        return self._snapshot.written()

    def check_run(self) -> None:
        """Checks the model between the steps of a run.

        Raises:
            RGTGError: weights were written to since it began.
        """
        if self.written:
            raise RGTGError(
                f"the weights of {self.name} changed in the middle of a run: finish or drop an iterator first"
            )

    # ---- forwards ---------------------------------------------------------------------------------------------------

    def reserve(
        self,
        slots: int,
        length: int,
        prompt_contexts: int = 1,
        shared_forward: bool = False,
        counter: Counter | None = None,
        undo: int = 0,
    ) -> None:
        """Begins a run: empties the cache and allocates what it needs; buffers that are large enough are kept.

        Args:
            slots: rows of the cache, all contexts of all prompts.
            length: tokens that a row may reach.
            prompt_contexts: rows for each prompt.
            shared_forward: whether steps execute candidates that an attached adapter scores.
            counter: counts this run's forwards and tokens; a new one by default.
            undo: tokens by which a row may be cut back (`roll_back`), besides all its tokens.
        """
        self.prompt_contexts, self.shared_forward = prompt_contexts, shared_forward
        self.cache.reserve(slots, length, undo)
        self._lengths = [0] * slots
        self._prompts, self._encoded = [()] * slots, [0] * slots
        if self.rope is not None:
            self.rope.reserve(slots, length, self.device)
        self.counter = Counter() if counter is None else counter
        if self.shared_forward:
            width = self.head.in_features
            dtype = torch.float32 if self.engine == "native" else self.dtype
            if len(self._states) < slots or self._states.shape[1] != self.branches:
                self._states = torch.zeros(slots, self.branches, width, dtype=dtype, device=self.device)

    def begin(self, slot: int, ids: Sequence[int]) -> None:
        """Makes a prompt the prefix of a slot.

        Samples of one prompt are encoded once: a prompt that another slot's prefix begins with is copied from there,
        and one that this slot's begins with stays.
        """
        source = self._slot_with(ids)
        if source is None:
            self.roll_back(slot, 0)
            self._extend(slot, ids, self._length_after(ids))
        else:
            if source != slot:
                self.cache.move(source, slot, len(ids))
                if self.rope is not None:
                    self.rope.move(source, slot)
                if self.shared_forward:
                    self._states[slot] = self._states[source]
            self.roll_back(slot, len(ids))
        self._prompts[slot] = ids
        self._encoded[slot] = len(ids) if source is None else 0

    def encoded(self, slot: int) -> int:
        """Tokens that the last `begin` of a slot computed: its prompt's, or 0 where they were in the cache."""
        return self._encoded[slot]

    def _slot_with(self, ids: Sequence[int]) -> int | None:
        """A slot whose prefix begins with a prompt; with shared_forward one that has no token after it."""
        slots = [slot for slot, prompt in enumerate(self._prompts) if ids and prompt == ids]
        slots = [slot for slot in slots if self.cache.keeps(slot, len(ids))]
        if self.rope is not None:
            long = self.rope.is_long(self._length_after(ids))
            slots = [slot for slot in slots if self.rope.long[slot] == long]
        return next(
            (slot for slot in slots if not self.shared_forward or self._lengths[slot] == len(ids)), None
        )

    def _length_after(self, ids: Sequence[int]) -> int:
        """Tokens of the first text whose state is read after a prompt: the prompt's own, or a step's."""
        return len(ids) if self.shared_forward else len(ids) + 1

    def prefill(self, slot: int, ids: Sequence[int]) -> torch.Tensor:
        """Appends tokens to a slot's prefix in one causal forward; returns their hidden states [S, E].

        Each state is that of the text which ends there: where frequencies change with its length, there are two
        forwards.
        """
        start = self._lengths[slot]
        if self.rope is None or not start < self.rope.original < start + len(ids):
            return self._extend(slot, ids, start + len(ids))
        short = self._extend(slot, ids[: self.rope.original - start], self.rope.original)
        return torch.cat([short, self._extend(slot, ids[len(short) :], start + len(ids))])

    def _extend(self, slot: int, ids: Sequence[int], length: int) -> torch.Tensor:
        """Appends tokens by the frequencies of a text of `length` tokens; returns their hidden states [S, E]."""
        if not ids:
            return torch.empty(0)
        start, count = self._lengths[slot], len(ids)
        tokens = to_device([ids], torch.int64, self.device)
        if self.rope is not None:
            self._follow(slot, length)
            self.rope.write(slot, start, tokens[0])
        hidden = self._run_causal(slot, start, tokens)
        if self.shared_forward:
            self._states[slot] = hidden[:, -1]
        self._lengths[slot] += count
        return hidden[0]

    def _run_causal(self, slot: int, start: int, tokens: torch.Tensor) -> torch.Tensor:
        """States [branches, S, E] of tokens [1, S] that follow the first `start` of a slot's prefix."""
        count = tokens.shape[1]
        positions = torch.arange(start, start + count, device=self.device).unsqueeze(0)
        self.cache.begin_prefill(slot, start, count)
        with nullcontext() if self.rope is None else self.rope.chosen(self.rope.long[slot]):
            hidden = self.layers.forward(tokens, positions, self.cache)
        self.cache.end_prefill(count)
        self.counter.prompt_tokens += count
        return hidden

    def _follow(self, slot: int, length: int) -> None:
        """Makes a slot's prefix what it is in a text of `length` tokens, by computing it again where that changes."""
        rope, prefix = self.rope, self._lengths[slot]
        assert rope is not None
        if rope.long[slot] == rope.is_long(length):
            return
        rope.long[slot] = rope.is_long(length)
        # The host's count of a slot without a row goes on.
        if 0 < prefix <= rope.room:
            self.cache.roll_back(slot, 0)
            self._run_causal(slot, 0, rope.ids[slot : slot + 1, :prefix])

    @property
    def follows_lengths(self) -> bool:
        """Whether prefixes may have to change before a step (`follow_lengths`)."""
        return self.rope is not None or self.cache.slides

    def follow_lengths(self, slots: Iterable[int]) -> None:
        """Prepares slots for a step, whose tokens may make their texts too long for their keys.

        `step` does so itself. A step that is replayed without the host needs it before.
        """
        slots = list(slots)
        if self.rope is not None:
            for slot in slots:
                self._follow(slot, self._lengths[slot] + 1)
        if self.cache.slides:
            self.cache.make_room(slots, self._lengths)

    def roll_back(self, slot: int, length: int) -> None:
        """Cuts a slot's prefix back to its first `length` tokens; nothing is copied or computed.

        Raises:
            RGTGError: tokens that `reserve` was not told of were dropped.
        """
        self.cache.roll_back(slot, length)
        self._lengths[slot] = length
        if length < len(self._prompts[slot]):
            self._prompts[slot] = ()

    def length(self, slot: int) -> int:
        """Tokens in a slot's prefix, from the host's own count."""
        return self._lengths[slot]

    def step(self, tokens: torch.Tensor, normed: bool = True, slots: Slots | None = None) -> torch.Tensor:
        """States [B, S, E] of S undecided tokens [B, S] per row, each of which sees its prefix and itself.

        Args:
            tokens: int64 token ids.
            normed: whether the final norm is part of the forward; False only where `layers.final_norm` is known.
            slots: slots of the rows; None: the first B.
        """
        rows, new_tokens = tokens.shape
        if self.follows_lengths:
            self.follow_lengths(range(rows) if slots is None else slots.host)
        if self.rope is not None:
            self.rope.stepped = tokens
        self._slots, index = slots, None if slots is None else slots.index
        self.cache.begin_step(rows, new_tokens, slots=index)
        lengths = self.cache.lengths[:rows] if index is None else self.cache.lengths[index]
        positions = lengths[:, None].expand(rows, new_tokens)
        self.counter.calls += 1
        self.counter.tokens += rows * new_tokens
        with nullcontext() if self.rope is None else self.rope.chosen(None):
            hidden = self.layers.forward(tokens, positions, self.cache, normed)
        self._stepped = hidden.unflatten(0, (rows, -1))
        return self._stepped[:, 0]

    def commit(self, choice: torch.Tensor) -> None:
        """Appends undecided token `choice[b]` [B] of the last step to each row's prefix; -1: none."""
        slots = self._slots
        if self.rope is not None:
            self.rope.commit(choice, self.cache.lengths, None if slots is None else slots.index)
        self.cache.commit(choice)
        if self.shared_forward:
            rows = torch.arange(len(choice), device=self.device)
            self._states[: len(choice)] = self._stepped[rows, :, choice]
        if slots is not None:
            # Rows of named slots go on after a step that added no token, so that their lengths must be known.
            for slot, chosen in zip(slots.host, choice.tolist(), strict=True):
                self._lengths[slot] += chosen >= 0
            return
        for slot in range(len(choice)):
            self._lengths[slot] += 1

    @property
    def lengths(self) -> list[int]:
        """Tokens in each slot's prefix by the host's own count; set after steps that ran without the host."""
        return list(self._lengths)

    @lengths.setter
    def lengths(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)

    def compile(self, options: Mapping[str, Any] | None = None) -> None:
        """Compiles the blocks for steps.

        Args:
            options: torch.compile's.

        Raises:
            RGTGError: the engine is native, or an option is unknown.
        """
        self.layers.compile(options)
        self.compiled = True
        if self.engine == "triton":
            self.engine = "transformers"

    def fuse_projections(self) -> None:
        """Fuses linear layers that read the same input into one product (`rgtg_fast.models.fused_projections`).

        Raises:
            RGTGError: the engine is native.
        """
        if self.engine == "native":
            raise RGTGError(
                "fuse_projections=True and engine='native': the native engine needs no fused projections, use "
                "engine='transformers'"
            )
        fuse_projections(self.model.base_model)
        self._snapshot.pin()

    def step_state(self) -> list[torch.Tensor]:
        """Tensors that a step changes besides keys and values: lengths, and with shared_forward the newest states."""
        return [*(part.cache.lengths for part in self.cache.parts), self._states]

    def buffers(self) -> list[torch.Tensor]:
        """The memory of the prefixes, at the addresses that a captured step will use."""
        kept = [x for part in self.cache.parts for x in part.cache.buffers()]
        return kept if self.rope is None else [*kept, self.rope.ids]

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` moves to slot `target`."""
        self.cache.move(source, target, self._lengths[source])
        if self.rope is not None:
            self.rope.move(source, target)
        if self.shared_forward:
            self._states[target] = self._states[source]
        self._lengths[target] = self._lengths[source]
        self._prompts[target] = self._prompts[source]

    def logits(self, hidden: torch.Tensor, head: nn.Linear | None = None) -> torch.Tensor:
        """The model's logits [B, V] for hidden states [B, E], with another vocabulary head in its own's place."""
        if head is None and isinstance(self.head, RewardHead):
            return scores_of(hidden, self.head).unsqueeze(-1)
        logits = self.layers.logits(hidden, self.head if head is None else head)
        cap = self.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """The one-label head's output [B, S] in at least float32 for hidden states [B, S, E]."""
        return scores_of(hidden, self.head)

    @property
    def embeddings(self) -> int:
        """Rows of the input embedding."""
        weight: Any = self.model.get_input_embeddings().weight
        return int(weight.shape[0])

    def hidden_uncached(self, ids: Sequence[int], branch: int = 0) -> torch.Tensor:
        """States [T, E] of a whole text's prefixes by the model's own uncached forward; `branch` as in `newest`."""
        tokens = torch.tensor([ids], dtype=torch.int64, device=self.device)
        with nullcontext() if self._rows is None else self._rows.only(branch):
            states = self._uncached(tokens)
            if self.rope is None or not self.rope.is_long(len(ids)):
                return states
            original = self.rope.original
            return torch.cat([self._uncached(tokens[:, :original]), states[original:]])

    def _uncached(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.base_model(input_ids=tokens, use_cache=False, **OUTPUTS).last_hidden_state[0]
