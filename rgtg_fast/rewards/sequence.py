"""A causal reward model with a scalar head: PARGS and ARGS."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from rgtg_fast.bundled import resolve
from rgtg_fast.errors import RGTGError
from rgtg_fast.models.adapter import Adapter, is_adapter
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import (
    ModelAndTokenizer,
    adapter_model,
    load_sequence_classifier,
    reward_runner,
)
from rgtg_fast.models.prompts import Prompt
from rgtg_fast.models.runner import Attached, Counter, ModelRunner, scores_of
from rgtg_fast.ops import score_and_sample
from rgtg_fast.rewards.base import Prefix, Reward
from rgtg_fast.rewards.compatibility import check_same_tokenizer, guide_ids, place_adapter


class SequenceReward(Reward):
    """r(x, y_<i ∘ v): a causal model's scalar head at the candidate's own position, the candidate being the last token.

    PARGS (arXiv 2406.07780) with a model trained on partial sequences, ARGS (arXiv 2402.01694) with one trained on
    full sequences: the same call. A step costs one forward of B·k tokens over one shared prefix cache. Where the reward
    model is an adapter on the base model itself, that forward is the base model's too: one forward a token for both.

    Args:
        model: path or hub id of an `AutoModelForSequenceClassification` with one label, a folder with a LoRA adapter
            and its score head in PEFT's format, `bundled:NAME`, a loaded `Adapter`, or a (model, tokenizer) pair.
        chat_template: Jinja chat template for the reward model's prompts; by default its own tokenizer's, and
            where that has none the base model's prompt ids. Answer ids are shared with the base model.
        share_trunk: whether an adapter runs in the base model's own forward. None: where its base is this model and
            its prompts read the same; True: refuse otherwise; False: a copy of the base model with the adapter merged.

    Raises:
        RGTGError: at binding: several labels, no trained head, another tokenizer, a model that cannot be cached, an
            adapter that cannot be served or, with `share_trunk=True`, not be shared.

    Example:
        >>> SequenceReward("adapter-folder", share_trunk=False).share_trunk
        False
    """

    on_device = True

    def __init__(
        self,
        model: str | os.PathLike[str] | ModelAndTokenizer | Adapter,
        chat_template: str | None = None,
        share_trunk: bool | None = None,
    ):
        super().__init__()
        self.source = model
        self.chat_template = chat_template
        self.share_trunk = share_trunk
        self.runner: ModelRunner | None = None
        self._attached: Attached | None = None
        self._head: torch.nn.Linear | None = None
        self._title = ""
        self._trunk: str | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._lm: LanguageModel | None = None

    def bind(
        self, lm: LanguageModel, *, dtype: torch.dtype | None, engine: str, max_length: int | None
    ) -> None:
        self._lm, self.runner, self._attached = lm, None, None
        adapter = self._adapter()
        if adapter is not None:
            head = adapter.reward_head()
            self._tokenizer, why = place_adapter(adapter, lm, self.chat_template, self.share_trunk)
            if why is None:
                self._share(adapter, head)
                return
            model, _ = adapter_model(adapter, (lm.runner.model, lm.tokenizer), dtype)
            self._trunk = f"a model of its own, the adapter merged into a copy of its base ({why})"
        elif self.share_trunk:
            raise RGTGError(
                f"share_trunk=True and {self.source!r} is no adapter folder: only an adapter shares the base model"
            )
        else:
            source = resolve(self.source) if isinstance(self.source, str) else self.source
            assert not isinstance(source, Adapter)
            model, self._tokenizer = load_sequence_classifier(source, lm.runner.model, dtype)
            check_same_tokenizer(lm.tokenizer, self._tokenizer, lm.runner.name, model.config._name_or_path)
            self._trunk = "a model of its own"
        self.runner = reward_runner(model, engine, max_length)
        self._title = self.runner.name
        embeddings = self.runner.embeddings
        used = lm.vocabulary if lm.tokenizer is None else min(len(lm.tokenizer), lm.vocabulary)
        if embeddings < used:
            raise RGTGError(
                f"the reward model {self.name} embeds {embeddings} tokens and the base model uses {used}: "
                "use a reward model with the same vocabulary, or TextReward(...)"
            )
        lm.vocabulary = min(lm.vocabulary, embeddings)

    def _adapter(self) -> Adapter | None:
        """The adapter that `model` names or is, None where it is a whole model."""
        if isinstance(self.source, Adapter):
            return self.source
        source = resolve(self.source) if isinstance(self.source, str) else self.source
        return Adapter.load(source) if not isinstance(source, tuple) and is_adapter(source) else None

    def _share(self, adapter: Adapter, head: torch.nn.Linear) -> None:
        assert self._lm is not None
        runner = self._lm.runner
        self._attached = runner.attach(adapter, scores_candidates=True)
        self._head = head.to(runner.device, torch.promote_types(runner.dtype, torch.float32))
        self._title = adapter.name
        rows = (
            f"rows of its own from layer {adapter.fork} on"
            if adapter.fork is not None
            else "no rows of its own"
        )
        self._trunk = f"the base model's, {rows}"

    @property
    def _bound(self) -> ModelRunner:
        if self._lm is None:
            raise RGTGError(
                "this SequenceReward belongs to no decoder yet: pass it to RewardGuidedDecoder.from_pretrained"
            )
        return self.runner or self._lm.runner

    @property
    def name(self) -> str:
        return f"SequenceReward({self._title or self._bound.name})"

    @property
    def trunk(self) -> str | None:
        return self._trunk

    @property
    def limit(self) -> int | None:
        return self._bound.limit

    @property
    def engine(self) -> str | None:
        return self._bound.engine

    @property
    def cache_bytes_per_token(self) -> int:
        return 0 if self.runner is None else self.runner.cache_bytes_per_token

    def cache_bytes(self) -> int:
        return 0 if self.runner is None else self.runner.cache.nbytes()

    def models(self) -> list[ModelRunner]:
        return [] if self.runner is None else [self.runner]

    def loaded(self) -> list[object]:
        return [*super().loaded(), *([] if self._tokenizer is None else [self._tokenizer])]

    def encode(self, prompt: Prompt) -> list[list[int]]:
        assert self._lm is not None
        if self._attached is not None:
            return []
        assert self.runner is not None
        return [guide_ids(prompt, self._lm.tokenizer, self._tokenizer, self.chat_template, self.runner)]

    def reserve(self, slots: int, length: int) -> None:
        self.counter = Counter()
        if self.runner is not None:
            self.runner.reserve(slots, length)
            self.counter = self.runner.counter

    # The decoder itself moves and commits the rows of the base model's forward, a sharing guide's among them.

    def admit(self, slot: int, prefix: Prefix, encoded: list[list[int]]) -> None:
        if self.runner is not None:
            self.runner.begin(slot, encoded[0])
        elif self._attached is not None and self._attached.variant:
            self.counter.prompt_tokens += self._attached.encoded(slot)

    def move(self, source: int, target: int) -> None:
        if self.runner is not None:
            self.runner.move(source, target)

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        if self.runner is not None:
            return self.runner.scores(self.runner.step(candidates))
        assert self._attached is not None
        assert self._head is not None
        if self._attached.variant:
            self.counter.tokens += candidates.numel()
        return scores_of(self._attached.candidates(), self._head)

    @property
    def fused(self) -> bool:
        # On a CPU the native engine norms within its one call.
        runner = self.runner
        return runner is not None and runner.device.type == "cuda" and runner.layers.final_norm is not None

    def choose(
        self,
        candidates: torch.Tensor,
        logprobs: torch.Tensor,
        beta: torch.Tensor,
        temperature: torch.Tensor,
        seed: torch.Tensor,
        position: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        runner = self.runner
        norm = None if runner is None else runner.layers.final_norm
        if runner is None or norm is None:
            return super().choose(candidates, logprobs, beta, temperature, seed, position)
        hidden = runner.step(candidates, normed=False)
        head, bias = runner.head.weight[0].detach(), runner.head.bias
        return score_and_sample(
            hidden,
            norm.weight,
            head,
            None if bias is None else bias.detach(),
            logprobs,
            beta,
            temperature,
            seed,
            position,
            norm.eps,
            norm.offset,
        )

    def commit(self, choice: torch.Tensor) -> None:
        if self.runner is not None:
            self.runner.commit(choice)

    @property
    def appends(self) -> bool:
        return self.runner is not None

    def append(self, slot: int, tokens: Sequence[int]) -> list[float]:
        return self._bound.scores(self._bound.prefill(slot, tokens)).tolist()

    def roll_back(self, slot: int, count: int) -> None:
        self._bound.roll_back(slot, self._bound.length(slot) - count)

    def score_answer(self, prefix: Prefix, answer: Sequence[int]) -> list[float]:
        if self.runner is not None:
            prompt_ids = self.encode(prefix.prompt)[0]
            hidden = self.runner.hidden_uncached([*prompt_ids, *answer])
            return self.runner.scores(hidden[len(prompt_ids) :]).tolist()
        assert self._attached is not None
        assert self._head is not None
        hidden = self._attached.hidden_uncached([*prefix.prompt_ids, *answer])
        return scores_of(hidden[len(prefix.prompt_ids) :], self._head).tolist()
