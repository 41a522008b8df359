"""Rewards for decoders and servers that have a loop of their own: requests come, grow and go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import index as whole_number
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rgtg_fast.config import Guidance, whole
from rgtg_fast.engine.guided_logits import GuidedLogits
from rgtg_fast.engine.locks import Turns
from rgtg_fast.engine.request import check_fits, check_guidance, encoded_row
from rgtg_fast.engine.request_rows import Request, RequestRows
from rgtg_fast.errors import RewardNaNError, RGTGError, shown
from rgtg_fast.models.device import free_bytes, resolve_dtype, without_autocast
from rgtg_fast.models.language_model import LanguageModel
from rgtg_fast.models.loading import ModelAndTokenizer
from rgtg_fast.models.prompts import PromptLike, as_prompts, check_known
from rgtg_fast.models.served_model import ServedModel
from rgtg_fast.rewards.base import Prefix, Reward
from rgtg_fast.rewards.parse import RewardLike, as_reward


class RequestScorer:
    """Scores the candidates of requests that come and go, for decoders and servers with a loop of their own.

    Add a request, score its next token together with any other requests', tell the token that was decided, and drop the
    request. Only tokens drive the scorer, so that it follows chunked prompts, preempted and cancelled requests, and
    beams. Rewards are those of `RewardGuidedDecoder`.

    Args:
        lm: the base model.
        reward: bound to it.
        max_requests: requests that may be present at once.
        max_length: tokens of prompt and answer.
        binding: the settings of `Reward.bind`.

    Attributes:
        lm: the base model, as far as rewards need it.
        reward: bound to it.
        max_requests: as given.
        max_length: tokens that a prompt and its answer may have together, in every context.

    Example:
        >>> scorer = RequestScorer.from_pretrained("lm", reward="reward-model")  # doctest: +SKIP
        >>> request = scorer.add([1, 2, 3])  # doctest: +SKIP
        >>> guided = scorer.guide([request], logits, Guidance(k=10, beta=1.0))  # doctest: +SKIP
        >>> scorer.advance(request, [int(guided.argmax())])  # doctest: +SKIP
    """

    def __init__(
        self,
        lm: LanguageModel,
        reward: Reward,
        max_requests: int,
        max_length: int | None,
        binding: dict[str, Any],
    ):
        self.lm, self.reward = lm, reward
        self.max_requests = whole("max_requests", max_requests, 1, 8)
        limits = [each for each in (lm.runner.limit, reward.limit, max_length) if each is not None]
        self.max_length = min(limits)
        reward.use_slots(None)
        reward.used_by(self)
        self._turns = Turns(lm, reward, binding)
        self._rows = RequestRows(lm, reward, self.max_requests, self.max_length)
        free = free_bytes(lm.runner.device)
        check_fits(self._rows.row_bytes(), self.max_requests, self.max_length, free, "max_requests")
        self._requests: dict[int, Request] = {}
        self._added = 0
        with self._turns.taken():
            self._turns.begin()
            self._turns.claim(self)
            self._rows.forget()
        self._served = self._turns.served()

    @classmethod
    @without_autocast()
    def from_pretrained(
        cls,
        lm: str | os.PathLike[str] | ModelAndTokenizer,
        reward: RewardLike,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_requests: int = 8,
        max_length: int | None = None,
        engine: str = "auto",
        label: str | int | None = None,
        trust_remote_code: bool = False,
        reward_weights: str | None = None,
    ) -> RequestScorer:
        """Loads a reward for a base model that another engine decodes with.

        Args:
            lm: path, hub id or (model, tokenizer) of the base model. Of a path only the config and the tokenizer are
                read, and the weights where the reward needs them: an adapter, which is merged into a copy of them, or
                contrastive prompts, which the scorer runs itself.
            reward: as in `RewardGuidedDecoder.from_pretrained`.
            device: "cpu" or "cuda"; by default CUDA where there is one, and a loaded model's own.
            dtype: of a reward model that is loaded; by default float32 on a CPU and bfloat16 on a GPU.
            max_requests: requests that may be present at once; their caches are allocated here.
            max_length: tokens of prompt and answer; by default the context of both models.
            engine: as in `RewardGuidedDecoder.from_pretrained`.
            label: as there.
            trust_remote_code: as there.
            reward_weights: as there.

        Raises:
            RGTGError: an argument or model that cannot work, in one line.
        """
        if max_length is not None:
            max_length = whole("max_length", max_length, 2, 512)
        own = as_reward(reward, label, trust_remote_code, reward_weights)
        if own is None:
            raise RGTGError("reward=None scores nothing: name a reward")
        executed = own.prompt_contexts > 0
        base = ServedModel.load(lm, device, dtype, engine, max_length, trust_remote_code, executed)
        kind = None if dtype is None else resolve_dtype(dtype, base.runner.device)
        binding = {"dtype": kind, "engine": engine, "max_length": max_length}
        own = own.for_decoder()
        own.bind(base, **binding)
        return cls(base, own, max_requests, max_length, binding)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Requests that are present."""
        return len(self._requests)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The base model's tokenizer."""
        return self.lm.tokenizer

    @property
    def vocabulary(self) -> int:
        """Number of tokens that may be chosen (V)."""
        return self.lm.vocabulary

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return self.lm.eos_ids

    @property
    def device(self) -> torch.device:
        """Where rewards are computed."""
        return self.lm.runner.device

    def cache_bytes(self) -> int:
        """Bytes of all prefix caches."""
        return self._rows.cache_bytes()

    def add(
        self, prompt: PromptLike, answer: Sequence[int] = (), weights: Sequence[float] | None = None
    ) -> int:
        """A request comes; its prompt is prefilled with the next score.

        Args:
            prompt: text, a chat or token ids, as in `RewardGuidedDecoder.generate`.
            answer: ids of answer tokens that were decided before, of a request that was preempted.
            weights: this request's weights of a `MixtureReward`.

        Returns:
            Its handle.

        Raises:
            RGTGError: an empty or unknown prompt, one that leaves no room for a token, or `max_requests` are present.
        """
        if len(self._requests) >= self.max_requests:
            raise RGTGError(
                f"{self.max_requests} requests are present: drop one, or raise max_requests (each takes cache memory)"
            )
        (given,) = as_prompts([prompt], self.tokenizer)
        guidance = Guidance(weights=weights)  # pyright: ignore[reportArgumentType], which it checks
        check_guidance(guidance, self.lm, self.reward)
        with self._turns.taken(self._served):
            if not self._requests:
                self._begin_run()
            row = encoded_row(given, 1, self.lm, self.reward, guidance)
            prefix = Prefix(row.prompt, row.prompt_ids, weights=row.weights)
            request = Request(prefix, row.encoded)
            prefix.answer = self._checked_answer(request, answer)
            self._added += 1
            self._requests[self._added] = request
            return self._added

    def drop(self, request: int) -> None:
        """A request has ended. Its slot keeps its prefix until it is needed, should the request come back."""
        self._rows.end(self._request(request))
        del self._requests[request]

    def advance(self, request: int, answer: Sequence[int]) -> None:
        """Tells the answer decided so far; the reward's models follow with the next score.

        Args:
            request: its handle.
            answer: ids of all its tokens. Where it does not continue the answer told before, the prefix of another
                request that it continues is copied, or it is computed again.

        Raises:
            RGTGError: ids outside the vocabulary, or more tokens than `max_length`.
        """
        known = self._request(request)
        known.prefix.answer = self._checked_answer(known, answer)

    def remaining(self, request: int) -> int:
        """Tokens that may still follow in a request."""
        return self._remaining(self._request(request))

    def _remaining(self, request: Request) -> int:
        return self.max_length - request.longest - len(request.prefix.answer)

    def _request(self, handle: int) -> Request:
        found = self._requests.get(handle)
        if found is None:
            raise RGTGError(f"request {handle!r} is not present: add it first")
        return found

    def _checked_answer(self, request: Request, answer: Sequence[int]) -> list[int]:
        """A request's answer: the one known before, grown, where the new one continues it."""
        known = request.prefix.answer
        try:
            # Told anew with each token: most are known.
            told = answer if isinstance(answer, list) else list(answer)
            begin = known if told[: len(known)] == known else []
            new = [whole_number(token) for token in told[len(begin) :]]
        except TypeError as error:
            raise RGTGError(f"answer={shown(answer)}: pass the ids of its tokens in a list") from error
        check_known(new, self.vocabulary, "the answer")
        if request.longest + len(told) > self.max_length:
            raise RGTGError(
                f"the prompt has {request.longest} tokens and its answer {len(told)}, more than max_length="
                f"{self.max_length}: end the request, or raise max_length up to the context of both models"
            )
        begin += new
        return begin

    # ---- rewards ----------------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[int], candidates: torch.Tensor) -> torch.Tensor:
        """Rewards of candidates for the next token, from one batched forward.

        Scoring changes nothing that `advance` has not told: it may be repeated.

        Args:
            requests: handles of B different requests.
            candidates: [B, K] int64 token ids.

        Returns:
            [B, K] rewards, in at least float32.

        Raises:
            RGTGError: an unknown request, the same one twice, or candidates of another shape.
        """
        if not isinstance(candidates, torch.Tensor) or candidates.dtype != torch.int64:
            raise RGTGError(f"candidates={shown(candidates)}: pass an int64 tensor [B, K]")
        if candidates.ndim != 2 or len(candidates) != len(requests):
            raise RGTGError(
                f"candidates have shape {list(candidates.shape)} for {len(requests)} requests: use [B, K]"
            )
        if candidates.numel():
            check_known(torch.stack(candidates.aminmax()).tolist(), self.vocabulary, "the candidates")
        present = self._present(requests)
        if not present:
            return torch.zeros(candidates.shape, device=self.device)
        with self._turns.taken(self._served):
            rewards = self._score(present, candidates.to(self.device))
        return rewards.clone()  # outside of inference mode: an ordinary tensor

    def guidance(self, requests: Sequence[int]) -> torch.Tensor:
        """Rewards [B, V] of every next token; only where `reward.scores_vocabulary`. Arguments as in `score`."""
        if not self.reward.scores_vocabulary:
            raise RGTGError(f"{self.reward.name} scores candidates, not the whole vocabulary: use score")
        present = self._present(requests)
        if not present:
            return torch.zeros(0, self.vocabulary, device=self.device)
        with self._turns.taken(self._served):
            rewards = self._guidance(present)
        return rewards.clone()  # as in score

    def guide(
        self,
        requests: Sequence[int],
        logits: torch.Tensor,
        guidance: Guidance | Sequence[Guidance],
        check: bool = True,
    ) -> torch.Tensor:
        """The base model's logits, guided: log π + β·r on the support of each row, -inf elsewhere.

        What samples from the result divides it by the temperature; that of a `Guidance` is not read.

        Args:
            requests: handles of B different requests.
            logits: [B, V'] of the base model for the next token, V' >= V; tokens from V on are never chosen. Entries
                of -inf stay so.
            guidance: one, or one per request. Weights of a mixture are those of `add`.
            check: whether a row without a usable reward raises. Otherwise its result is NaN throughout, for a server
                that ends that request alone.

        Returns:
            [B, V'] float32.

        Raises:
            RewardNaNError: a reward is NaN or +inf; `row` is the request's handle.
            RGTGError: settings that the reward does not allow, logits of another shape, or no candidate.
        """
        rows: list[Any] = (
            list(guidance) if isinstance(guidance, (list, tuple)) else [guidance] * len(requests)
        )
        if logits.ndim != 2 or len(logits) != len(requests) or logits.shape[1] < self.vocabulary:
            raise RGTGError(
                f"logits have shape {list(logits.shape)} for {len(requests)} requests: use [B, V], "
                f"V >= {self.vocabulary}"
            )
        if len(rows) != len(requests):
            raise RGTGError(f"{len(rows)} guidances for {len(requests)} requests: pass one, or one each")
        for each in set(rows):
            self._check_guidance(each)
        present = self._present(requests)
        if not present:
            return logits.float()
        with self._turns.taken(self._served):
            support = GuidedLogits(logits[:, : self.vocabulary].to(self.device), rows)
            if self.reward.scores_vocabulary:
                support.select_with(self._guidance(present))
            else:
                self._score_support(present, support)
            return self._guided(present, support, logits, check)

    def _present(self, requests: Sequence[int]) -> dict[int, Request]:
        """Requests that are to be scored, by their handles.

        Raises:
            RGTGError: one that is not present, the same one twice, or one that has no room for a token.
        """
        present = {handle: self._request(handle) for handle in requests}
        if len(present) < len(requests):
            raise RGTGError(f"requests {list(requests)} name one twice: give each once")
        for handle, request in present.items():
            if self._remaining(request) < 1:
                raise RGTGError(
                    f"request {handle} has all of its max_length={self.max_length} tokens: drop it, or raise "
                    "max_length up to the context of both models"
                )
        return present

    def _check_guidance(self, guidance: Guidance) -> None:
        if not isinstance(guidance, Guidance) or guidance.weights is not None:
            raise RGTGError(
                f"guidance={guidance!r}: pass Guidance(k=..., beta=...); a mixture's weights belong to add"
            )
        if guidance.gate_entropy is not None and self.reward.scores_vocabulary:
            raise RGTGError(
                f"gate_entropy={guidance.gate_entropy} and {self.reward.name}, which scores the whole vocabulary in "
                "every step: leave it out"
            )
        ungated = Guidance(guidance.k, guidance.beta, guidance.temperature, guidance.support)
        check_guidance(ungated, self.lm, self.reward)

    def _score_support(self, requests: dict[int, Request], support: GuidedLogits) -> None:
        """Scores the k most probable tokens of the rows whose gates are open."""
        guided = support.select()
        if not guided:
            return
        if len(guided) == len(requests):
            support.rewards = self._score(requests, support.candidates).to(support.rewards.dtype)
            return
        handles = list(requests)
        open_ones = {handles[row]: requests[handles[row]] for row in guided}
        rewards = self._score(open_ones, support.candidates[guided])
        support.rewards[guided] = rewards.to(support.rewards.dtype)

    def _guided(
        self, requests: dict[int, Request], support: GuidedLogits, logits: torch.Tensor, check: bool
    ) -> torch.Tensor:
        scores, unusable = support.scores()  # [B, K], [B, K]
        with torch.inference_mode(False):  # the caller's sampler may write into it
            out = torch.full(logits.shape, -torch.inf, dtype=torch.float32, device=scores.device)
        out.scatter_(1, support.candidates, scores.float())
        # Logits that are NaN or +inf, or all -inf, leave no distribution to sample from.
        empty = ~(scores < torch.inf).all(1) | (scores == -torch.inf).all(1)
        bad = unusable.any(1) | empty
        if not check:
            return out.masked_fill_(bad.unsqueeze(1), torch.nan).to(logits.device)
        for row, (handle, wrong) in enumerate(zip(requests, bad.tolist(), strict=True)):
            if not wrong:
                continue
            step = len(requests[handle].prefix.answer)
            if not unusable[row].any():
                raise RGTGError(f"no candidate of request {handle}, token {step} has a finite score")
            token = int(support.candidates[row, unusable[row].int().argmax()])
            raise RewardNaNError(handle, step, token, self.lm.token_text(token))
        return out.to(logits.device)

    # ---- the rows ---------------------------------------------------------------------------------------------------

    def _score(self, requests: dict[int, Request], candidates: torch.Tensor) -> torch.Tensor:
        self._check_turn()
        rewards = self._rows.score(list(requests.values()), candidates)
        return rewards.to(torch.promote_types(rewards.dtype, torch.float32))

    def _guidance(self, requests: dict[int, Request]) -> torch.Tensor:
        self._check_turn()
        return self._rows.guidance(list(requests.values()))

    def _check_turn(self) -> None:
        """As `Turns.check`; what the models hold stays, since it may be another run's by now."""
        try:
            self._turns.check(self)
        except RGTGError as error:
            raise RGTGError(f"{error}; a RequestScorer goes on once all its requests are dropped") from error

    def _begin_run(self) -> None:
        """Takes over changes of the weights while no request is present: prefixes of old ones are forgotten.

        So are all of them where another run has used the reward since.
        """
        owned = self._turns.belongs_to(self)
        # First: a model that `begin` refuses leaves no other one's old prefixes.
        if owned and any(model.written for model in self._rows.models()):
            self._rows.forget()
        self._turns.begin()
        if not owned:
            self._turns.claim(self)
            self._rows.forget()
