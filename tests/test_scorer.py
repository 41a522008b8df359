"""Requests that come and go have the rewards that the decoder gives them, bit for bit on a CPU."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MistralConfig, Phi3Config

from rgtg_fast import (
    AutoregressiveReward,
    ContrastiveReward,
    FunctionReward,
    Guidance,
    MixtureReward,
    RADReward,
    RequestScorer,
    Reward,
    RewardGuidedDecoder,
    RewardNaNError,
    RGTGError,
    SequenceReward,
    TextReward,
    VocabularyReward,
)
from rgtg_fast.engine.outputs import GeneratedRow
from rgtg_fast.models.kv_cache import Slots
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.engine.support import prompts_of

PROMPTS = [*prompts_of(5, seed=3), [7, 8, 9], [7, 8, 9]]
NEW_TOKENS = 7


def _by_last(prefix_ids: list[torch.Tensor], candidates: torch.Tensor) -> torch.Tensor:
    sums = torch.stack([ids.sum() for ids in prefix_ids]).unsqueeze(1)
    return ((sums * 31 + candidates * 17) % 11).float()


REWARDS: dict[str, Callable[[], Reward]] = {
    "sequence": lambda: SequenceReward((make_rm(1), None)),
    "rad": lambda: RADReward((make_rm(1), None), invert=True),
    "vocabulary": lambda: VocabularyReward((make_lm(2), None)),
    "autoregressive": lambda: AutoregressiveReward((make_lm(2), None)),
    "contrastive": ContrastiveReward,
    "function": lambda: FunctionReward(_by_last),
    "text": lambda: TextReward(
        lambda prompts, answers: [len(p) - 0.1 * len(a) for p, a in zip(prompts, answers, strict=True)]
    ),
    "mixture": lambda: MixtureReward(
        [SequenceReward((make_rm(1), None)), VocabularyReward((make_lm(2), None)), ContrastiveReward()],
        weights=[1.0, 0.5, -0.3],
    ),
    "windows": lambda: SequenceReward((_windowed(), None)),
    "windows of a vocabulary": lambda: VocabularyReward((_windowed(AutoModelForCausalLM), None)),
    "longrope": lambda: SequenceReward((_of_two_ropes(), None)),
    "transformers": lambda: MixtureReward([REWARDS["sequence"](), REWARDS["autoregressive"]()]),
}
# Products of torch depend on the size of a batch.
INEXACT = {"transformers", "longrope"}


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_labels": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
}


def _windowed(kind: Any = AutoModelForSequenceClassification) -> torch.nn.Module:
    torch.manual_seed(4)
    return kind.from_config(MistralConfig(**SHAPE, sliding_window=5)).eval()


def _of_two_ropes() -> torch.nn.Module:
    """A model whose rope changes where a text has more than 8 tokens."""
    torch.manual_seed(4)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 8,
        "factor": 16.0,
    }
    config = Phi3Config(
        **SHAPE, original_max_position_embeddings=8, sliding_window=None, rope_parameters=rope
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


class Case:
    """Rows that the decoder has made, with every step's candidates and rewards, and a scorer of the same models."""

    def __init__(self, kind: str, slots: int = 4):
        pair = make_lm(0), make_tokenizer()
        engine = "transformers" if kind == "transformers" else "auto"
        self.exact = kind not in INEXACT
        decoder = RewardGuidedDecoder.from_pretrained(pair, REWARDS[kind](), max_batch=3, engine=engine)
        self.guidance = [Guidance(k=4 + index % 2, beta=0.7, temperature=0) for index in range(len(PROMPTS))]
        result = decoder.generate(PROMPTS, NEW_TOKENS, self.guidance, trace=True)
        self.rows: list[GeneratedRow] = list(result)
        self.scorer = RequestScorer.from_pretrained(
            pair, REWARDS[kind](), max_requests=slots, max_length=64, engine=engine
        )

    def answer(self, row: int) -> list[int]:
        """All decisions of a row, the end of the text included."""
        made = self.rows[row]
        return [*made.tokens, *([] if made.end_token is None else [made.end_token])]

    def check(
        self, requests: dict[int, int], done: dict[int, int], rows: list[int], guided: bool = False
    ) -> None:
        """Scores the next token of rows, or guides it; `done` tokens of each are decided."""
        traces = [self.rows[row].trace or [] for row in rows]
        steps = [trace[done[row]] for trace, row in zip(traces, rows, strict=True)]
        k = min(len(step.candidates) for step in steps)
        tokens = [[candidate.token for candidate in step.candidates[:k]] for step in steps]
        expected = [[candidate.reward for candidate in step.candidates[:k]] for step in steps]
        candidates, rewards = torch.tensor(tokens), torch.tensor(expected, dtype=torch.float64)
        handles = [requests[row] for row in rows]
        if not guided:
            found = self.scorer.score(handles, candidates)
            if self.exact:
                assert found.double().tolist() == rewards.tolist()
            torch.testing.assert_close(found.double(), rewards, rtol=1e-5, atol=1e-4)
            return
        # All candidates are as probable.
        logits = torch.full((len(rows), 64), -torch.inf).scatter(1, candidates, 0.0)
        logits = self.scorer.guide(handles, logits, Guidance(k=k, beta=2.0))
        expected_logits = 2 * rewards - torch.tensor(float(k)).log()
        torch.testing.assert_close(
            logits.gather(1, candidates).double(), expected_logits, rtol=1e-5, atol=3e-4
        )


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {}


def _case(cases: dict[str, Case], kind: str) -> Case:
    if kind not in cases:
        cases[kind] = Case(kind)
    return cases[kind]


def _schedule(case: Case, rng: random.Random) -> None:
    """Random arrivals, scores of random subsets, decisions that were not scored, preemptions and cancellations."""
    requests: dict[int, int] = {}
    done = dict.fromkeys(range(len(case.rows)), 0)
    waiting = rng.sample(range(len(case.rows)), len(case.rows))
    for _ in range(40):
        while waiting and len(requests) < case.scorer.max_requests and rng.random() < 0.7:
            row = waiting.pop()
            requests[row] = case.scorer.add(PROMPTS[row], case.answer(row)[: done[row]])
        chosen = [row for row in requests if rng.random() < 0.7]
        rng.shuffle(chosen)
        if chosen:
            case.check(requests, done, chosen, guided=rng.random() < 0.3)
        for row in list(requests):
            answer = case.answer(row)
            if rng.random() < (0.9 if row in chosen else 0.2):
                done[row] += 1 if rng.random() < 0.9 else 2
            if done[row] >= len(answer):
                case.scorer.drop(requests.pop(row))
            elif (event := rng.random()) < 0.1:
                case.scorer.drop(requests.pop(row))
                if event < 0.07:
                    waiting.insert(0, row)
            else:
                if event > 0.9:  # a step is taken back
                    case.scorer.advance(requests[row], [*answer[: done[row] - 1], 5])
                if event > 0.95:
                    case.scorer.score([requests[row]], torch.tensor([[5, 6]]))
                case.scorer.advance(requests[row], answer[: done[row]])
    for request in requests.values():
        case.scorer.drop(request)
    assert len(case.scorer) == 0


@pytest.mark.parametrize("kind", REWARDS)
def test_requests_have_the_decoders_rewards(
    cases: dict[str, Case], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows of windows drop tokens.
    monkeypatch.setattr("rgtg_fast.models.split_cache.SLACK", 3)
    for seed in range(1 if kind in INEXACT else 3):
        _schedule(_case(cases, kind), random.Random(seed))


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [
        ("sequence", Guidance(k=5, beta=0.8)),
        ("sequence", Guidance(k=5, beta=0.8, gate_entropy=2.5)),
        ("rad", Guidance(k=3, beta=-2.0)),
        ("autoregressive", Guidance(k=5, beta=0.8)),
        ("autoregressive", Guidance(k=5, beta=0.8, support="combined")),
        ("autoregressive", Guidance(beta=0.8, support="all")),
        ("contrastive", Guidance(beta=0.8, support="all")),
        ("mixture", Guidance(k=5, beta=0.8)),
        ("function", Guidance(k=5, beta=0.3)),
    ],
)
def test_guided_logits_decode_as_the_decoder_does(kind: str, guidance: Guidance) -> None:
    model, tokenizer = make_lm(0), make_tokenizer()
    greedy = replace(guidance, temperature=0)
    decoder = RewardGuidedDecoder.from_pretrained((model, tokenizer), REWARDS[kind]())
    expected = decoder.generate(PROMPTS, NEW_TOKENS, greedy)
    scorer = RequestScorer.from_pretrained(
        (model, tokenizer), REWARDS[kind](), max_requests=len(PROMPTS), max_length=64
    )
    answers: dict[int, list[int]] = {scorer.add(prompt): [] for prompt in PROMPTS}
    requests = list(answers)
    for _ in range(NEW_TOKENS):
        logits = []
        for request, prompt in zip(requests, PROMPTS, strict=True):
            ids = torch.tensor([[*prompt, *answers[request]]])
            logits.append(model(ids).logits[0, -1])
        guided = scorer.guide(requests, torch.stack(logits).detach(), guidance)
        for request, token in zip(requests, guided.argmax(1).tolist(), strict=True):
            answers[request].append(token)
            scorer.advance(request, answers[request])
    if kind == "sequence" and guidance.gate_entropy is None:
        # A candidate that became a token is committed: nothing runs twice.
        assert scorer.reward.counter.tokens == NEW_TOKENS * len(PROMPTS) * guidance.k
    for row, request in zip(expected, requests, strict=True):
        end = [] if row.end_token is None else [row.end_token]
        assert answers[request][: len(row.tokens) + len(end)] == [*row.tokens, *end]


def test_rows_of_one_batch_may_differ_in_support_and_width() -> None:
    pair = make_lm(0), make_tokenizer()
    scorer = RequestScorer.from_pretrained(pair, REWARDS["vocabulary"](), max_requests=4, max_length=64)
    settings = [
        Guidance(k=3, beta=0.5),
        Guidance(k=6, beta=2.0, support="combined"),
        Guidance(beta=1.0, support="all"),
    ]
    requests = [scorer.add(PROMPTS[index]) for index in range(3)]
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    logits[:, 5] = -torch.inf  # forbidden by the server
    together = scorer.guide(requests, logits, settings)
    rewards = scorer.guidance(requests)
    for index, guidance in enumerate(settings):
        alone = scorer.guide(requests[index : index + 1], logits[index : index + 1], guidance)
        assert torch.equal(together[index], alone[0])
        scores = logits[index].log_softmax(-1) + guidance.beta * rewards[index]
        order = logits[index] if guidance.support == "lm" else scores
        kept = order.topk(64 if guidance.support == "all" else guidance.k).indices
        expected = torch.full((64,), -torch.inf).scatter(0, kept, scores[kept])
        torch.testing.assert_close(together[index], expected, rtol=0, atol=1e-5)
        assert together[index, 5] == -torch.inf


def test_beams_take_prefixes_over() -> None:
    pair = make_lm(0), make_tokenizer()
    for kind in ("sequence", "autoregressive", "contrastive", "function", "mixture"):
        scorer = RequestScorer.from_pretrained(pair, REWARDS[kind](), max_requests=4, max_length=64)
        alone = RequestScorer.from_pretrained(pair, REWARDS[kind](), max_requests=1, max_length=64)
        rng = random.Random(5)
        beams: list[list[int]] = [[], [], [], []]
        requests = [scorer.add(PROMPTS[0]) for _ in beams]
        candidates = torch.tensor([[11, 12, 13, 14]] * 4)
        for _ in range(5):
            found = scorer.score(requests, candidates)
            for beam, rewards in zip(beams, found, strict=True):
                request = alone.add(PROMPTS[0], beam)
                assert torch.equal(alone.score([request], candidates[:1])[0], rewards), (kind, beam)
                alone.drop(request)
            parents = [rng.randrange(4) for _ in beams]
            beams = [[*beams[parent], rng.choice([11, 12, 13, 14])] for parent in parents]
            for request, beam in zip(requests, beams, strict=True):
                scorer.advance(request, beam)
        # A beam's prefix is copied, not computed again: at most its last token, which another beam did not choose.
        tokens = scorer.reward.counter.tokens
        if kind == "sequence":
            assert tokens <= 5 * 4 * 4 + 5 * 4


def test_a_preempted_request_finds_its_prefix() -> None:
    pair = make_lm(0), make_tokenizer()
    scorer = RequestScorer.from_pretrained(pair, REWARDS["sequence"](), max_requests=2, max_length=64)
    request = scorer.add(PROMPTS[0])
    candidates = torch.tensor([[11, 12]])
    for length in range(4):
        scorer.advance(request, [11] * length)
        scorer.score([request], candidates)
    scorer.drop(request)
    counter = scorer.reward.counter
    before = counter.tokens, counter.prompt_tokens
    back = scorer.add(PROMPTS[0], [11] * 3)
    scorer.score([back], candidates)
    assert (counter.tokens, counter.prompt_tokens) == (before[0] + 2, before[1])


def test_a_nan_reward_ends_its_own_row_alone() -> None:
    def poisoned(prefix_ids: list[torch.Tensor], candidates: torch.Tensor) -> torch.Tensor:
        rewards = torch.zeros(candidates.shape)
        for row, ids in enumerate(prefix_ids):
            if int(ids[-1]) == 9:
                rewards[row, 0] = torch.nan
        return rewards

    scorer = RequestScorer.from_pretrained((make_lm(0), None), poisoned, max_requests=2, max_length=64)
    good, bad = scorer.add([7, 8]), scorer.add([7, 9])
    logits = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    guided = scorer.guide([good, bad], logits, Guidance(k=3), check=False)
    assert guided[0].isfinite().sum() == 3
    assert guided[1].isnan().all()
    with pytest.raises(RewardNaNError) as error:
        scorer.guide([good, bad], logits, Guidance(k=3))
    assert (error.value.row, error.value.step) == (bad, 0)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_row_without_logits_is_refused(value: float) -> None:
    scorer = RequestScorer.from_pretrained((make_lm(0), None), lambda _, ids: ids * 0.1, max_requests=2)
    requests = [scorer.add([7, 8]), scorer.add([7, 9])]
    logits = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    logits[1] = value
    guided = scorer.guide(requests, logits, Guidance(k=3), check=False)
    assert guided[0].isfinite().sum() == 3
    assert guided[1].isnan().all()
    with pytest.raises(RGTGError, match=f"no candidate of request {requests[1]}"):
        scorer.guide(requests, logits, Guidance(k=3))


def test_a_forward_that_fails_loses_no_request() -> None:
    fails = [False]

    def function(prefix_ids: list[torch.Tensor], candidates: torch.Tensor) -> torch.Tensor:
        if fails[0]:
            raise OSError("no answer")
        return _by_last(prefix_ids, candidates)

    reward = MixtureReward([SequenceReward((make_rm(1), None)), FunctionReward(function)])
    scorer = RequestScorer.from_pretrained((make_lm(0), None), reward, max_requests=2, max_length=64)
    request, candidates = scorer.add([7, 8, 9]), torch.tensor([[11, 12]])
    first = scorer.score([request], candidates)
    fails[0] = True
    with pytest.raises(OSError, match="no answer"):
        scorer.score([request], candidates)
    fails[0] = False
    assert torch.equal(scorer.score([request], candidates), first)


def test_a_refused_call_costs_no_prefix() -> None:
    pair = make_lm(0), make_tokenizer()
    scorer = RequestScorer.from_pretrained(pair, (make_rm(1), None), max_requests=2, max_length=8)
    request, candidates = scorer.add([7, 8, 9]), torch.tensor([[11, 12]])
    first = scorer.score([request], candidates)
    refused: list[Callable[[], object]] = [
        lambda: scorer.score([request, request], torch.tensor([[1], [2]])),
        lambda: scorer.score([99], candidates),
        lambda: scorer.score([request], torch.tensor([[64]])),
        lambda: scorer.score([request], torch.tensor([[1.5]])),
        lambda: scorer.guidance([request]),
        lambda: scorer.guide([request], torch.zeros(1, 64), None),  # pyright: ignore[reportArgumentType]
        lambda: scorer.advance(request, ["a"]),  # pyright: ignore[reportArgumentType]
        lambda: scorer.add([7], [1.5]),  # pyright: ignore[reportArgumentType]
        lambda: scorer.add([7], weights=3),  # pyright: ignore[reportArgumentType]
    ]
    for call in refused:
        with pytest.raises(RGTGError):
            call()
    before = scorer.reward.counter.prompt_tokens
    assert torch.equal(scorer.score([request], candidates), first)
    assert scorer.reward.counter.prompt_tokens == before
    assert scorer.score([], candidates[:0]).shape == (0, 2)
    assert scorer.guide([], torch.zeros(0, 64), Guidance()).shape == (0, 64)
    assert len(scorer) == 1


def test_every_token_of_another_answer_is_checked() -> None:
    scorer = RequestScorer.from_pretrained((make_lm(0), None), _by_last, max_requests=1, max_length=8)
    request = scorer.add([7, 8])
    scorer.advance(request, [9, 9])
    with pytest.raises(RGTGError, match="token id 64, outside the vocabulary"):
        scorer.advance(request, [64])
    scorer.advance(request, [9] * 6)
    with pytest.raises(RGTGError, match="request 1 has all of its max_length=8 tokens"):
        scorer.score([request], torch.tensor([[1]]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_without_a_distribution_end_their_own_row_alone(value: float) -> None:
    scorer = RequestScorer.from_pretrained((make_lm(0), None), _by_last, max_requests=2, max_length=8)
    requests = [scorer.add([7, 8]), scorer.add([7, 9])]
    logits = torch.zeros(2, 64)
    logits[1] = value
    guided = scorer.guide(requests, logits, Guidance(k=3), check=False)
    assert guided[0].isfinite().sum() == 3
    assert guided[1].isnan().all()
    with pytest.raises(RGTGError, match="no candidate of request 2, token 0 has a finite score"):
        scorer.guide(requests, logits, Guidance(k=3))


def test_new_weights_of_a_mixture_count_for_the_next_request() -> None:
    reward = MixtureReward([FunctionReward(_by_last)], [1.0])
    scorer = RequestScorer.from_pretrained((make_lm(0), None), reward, max_requests=1, max_length=8)
    candidates = torch.tensor([[11, 12]])
    first = scorer.score([scorer.add([7, 8])], candidates)
    scorer.drop(1)
    reward.weights = [3.0]
    assert torch.equal(scorer.score([scorer.add([7, 8])], candidates), 3 * first)


class CountingReward(Reward):
    """A user's reward: how often a candidate has occurred in its own copy of the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[int, list[int]] = {}
        self.slots: list[int] = []
        self.scored = torch.empty(0)

    def bind(self, lm: object, **settings: object) -> None: ...

    def admit(self, slot: int, prefix: object, encoded: object) -> None:
        self.answers[slot] = []

    def move(self, source: int, target: int) -> None:
        self.answers[target] = list(self.answers[source])

    def use_slots(self, slots: Slots | None) -> None:
        self.slots = [0] if slots is None else slots.host

    def score(self, candidates: torch.Tensor) -> torch.Tensor:
        self.scored = candidates
        pairs = zip(self.slots, candidates.tolist(), strict=True)
        return torch.tensor(
            [[float(self.answers[slot].count(token)) for token in row] for slot, row in pairs]
        )

    def commit(self, choice: torch.Tensor) -> None:
        for slot, row, chosen in zip(self.slots, self.scored.tolist(), choice.tolist(), strict=True):
            if chosen >= 0:
                self.answers[slot].append(row[chosen])

    def score_answer(self, prefix: object, answer: object) -> list[float]:
        return []


def test_a_users_reward_follows_tokens_that_were_not_scored() -> None:
    scorer = RequestScorer.from_pretrained((make_lm(0), None), CountingReward(), max_requests=2, max_length=9)
    request, other = scorer.add([7]), scorer.add([8], [3, 3])
    candidates = torch.tensor([[3, 4], [3, 4]])
    assert scorer.score([request, other], candidates).tolist() == [[0, 0], [2, 0]]
    scorer.advance(request, [4, 3, 3])
    assert scorer.score([other, request], candidates).tolist() == [[2, 0], [2, 1]]
    scorer.advance(request, [4])
    assert scorer.score([request], candidates[:1]).tolist() == [[0, 1]]


def test_a_users_reward_is_taken_over_once_no_request_is_present() -> None:
    pair, reward = (make_lm(0), make_tokenizer()), CountingReward()
    scorer = RequestScorer.from_pretrained(pair, reward, max_requests=1, max_length=9)
    request, candidates = scorer.add([7], [3]), torch.tensor([[3, 4]])
    scorer.score([request], candidates)
    decoder = RewardGuidedDecoder.from_pretrained(pair, reward)
    run = decoder.stream([7], 4, Guidance(k=2, temperature=0))
    begun = [next(run).token]
    # The run goes on although the scorer asked: what it holds was not touched.
    with pytest.raises(RGTGError, match=r"the same reward.* once all its requests are dropped"):
        scorer.score([request], candidates)
    begun += [chunk.token for chunk in run]
    assert begun == decoder.generate([[7]], 4, Guidance(k=2, temperature=0))[0].tokens
    scorer.drop(request)
    assert scorer.score([scorer.add([7], [3])], candidates).tolist() == [[1, 0]]


def test_prefixes_of_other_weights_are_forgotten() -> None:
    rm = make_rm(1)
    scorer = RequestScorer.from_pretrained((make_lm(0), None), (rm, None), max_requests=2, max_length=64)
    candidates = torch.tensor([[11, 12]])
    request = scorer.add([7, 8, 9])
    scorer.score([request], candidates)
    scorer.drop(request)
    with torch.no_grad():
        rm.score.weight.mul_(2)
        rm.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    request = scorer.add([7, 8, 9])
    expected = [rm(torch.tensor([[7, 8, 9, token]])).logits.item() for token in (11, 12)]
    torch.testing.assert_close(
        scorer.score([request], candidates)[0].tolist(), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_an_adapter_is_merged_into_a_copy_of_the_base(smollm2: Path) -> None:
    prompt = "Name three colours."
    decoder = RewardGuidedDecoder.from_pretrained(str(smollm2), "bundled:pargs", max_length=64)
    row = decoder.generate(prompt, 3, Guidance(k=3, temperature=0), trace=True)[0]
    scorer = RequestScorer.from_pretrained(str(smollm2), "bundled:pargs", max_requests=1, max_length=64)
    request = scorer.add(prompt)
    for step in row.trace or []:
        found = scorer.score([request], torch.tensor([[each.token for each in step.candidates]]))
        expected = torch.tensor([[each.reward for each in step.candidates]])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        scorer.advance(request, row.tokens[: step.position + 1])


def test_bad_input_is_refused_in_one_line() -> None:
    pair = make_lm(0), make_tokenizer()
    with pytest.raises(RGTGError, match="reward=None scores nothing"):
        RequestScorer.from_pretrained(pair, None)
    with pytest.raises(RGTGError, match="max_requests=0"):
        RequestScorer.from_pretrained(pair, _by_last, max_requests=0)
    scorer = RequestScorer.from_pretrained(pair, (make_rm(1), None), max_requests=2, max_length=8)
    first = scorer.add([7, 8])
    scorer.add([7, 9])
    with pytest.raises(RGTGError, match="2 requests are present"):
        scorer.add([7])
    with pytest.raises(RGTGError, match="name one twice"):
        scorer.score([first, first], torch.tensor([[1], [2]]))
    with pytest.raises(RGTGError, match="request 99 is not present"):
        scorer.score([99], torch.tensor([[1]]))
    with pytest.raises(RGTGError, match="token id 64, outside the vocabulary"):
        scorer.advance(first, [64])
    assert scorer.remaining(first) == 6
    with pytest.raises(RGTGError, match="more than max_length=8"):
        scorer.advance(first, [9] * 7)
    with pytest.raises(RGTGError, match="support='all' needs a reward over the whole vocabulary"):
        scorer.guide([first], torch.zeros(1, 64), Guidance(support="all"))
    with pytest.raises(RGTGError, match=r"logits have shape \[1, 63\]"):
        scorer.guide([first], torch.zeros(1, 63), Guidance())
    with pytest.raises(RGTGError, match="a mixture's weights belong to add"):
        scorer.guide([first], torch.zeros(1, 64), Guidance(weights=(1.0,)))

    class Own(Reward):
        def bind(self, lm: object, **settings: object) -> None: ...

        def score(self, candidates: torch.Tensor) -> torch.Tensor:
            return candidates.float()

        def score_answer(self, prefix: object, answer: object) -> list[float]:
            return []

    with pytest.raises(RGTGError, match=r"define Own\.use_slots"):
        RequestScorer.from_pretrained(pair, Own())


def test_a_newer_run_takes_the_models_over() -> None:
    reward = (make_rm(1), None)
    pair = make_lm(0), make_tokenizer()
    shared = SequenceReward(reward)
    scorer = RequestScorer.from_pretrained(pair, shared, max_requests=1, max_length=32)
    request = scorer.add([7, 8])
    first = scorer.score([request], torch.tensor([[9]]))
    # The same object in a decoder is a copy of its own.
    RewardGuidedDecoder.from_pretrained(pair, shared).generate([[7, 8]], 2)
    assert torch.equal(scorer.score([request], torch.tensor([[9]])), first)


def test_the_example_of_an_own_loop_decodes_as_the_decoder_does() -> None:
    path = Path(__file__).parent.parent / "examples" / "own_loop.py"
    spec = importlib.util.spec_from_file_location("own_loop", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    pair, reward = (make_lm(0), make_tokenizer()), (make_rm(1), None)
    scorer = RequestScorer.from_pretrained(pair, reward, max_requests=3, max_length=64)
    guidance = Guidance(k=5, beta=0.8, temperature=0)
    answers = example.decode(pair[0], scorer, PROMPTS[:3], guidance, NEW_TOKENS)
    rows = RewardGuidedDecoder.from_pretrained(pair, reward).generate(PROMPTS[:3], NEW_TOKENS, guidance)
    assert answers == [[*row.tokens, *([] if row.end_token is None else [row.end_token])] for row in rows]


def test_results_are_ordinary_tensors() -> None:
    """A sampler of one's own may write into them."""
    scorer = RequestScorer.from_pretrained(
        (make_lm(0), None), REWARDS["vocabulary"](), max_requests=1, max_length=32
    )
    request, logits = scorer.add([7, 8]), torch.randn(1, 64)
    for made in (
        scorer.score([request], torch.tensor([[9]])),
        scorer.guidance([request]),
        scorer.guide([request], logits, Guidance(k=3)),
        scorer.guide([request], logits, Guidance(k=3), check=False),
    ):
        made.mul_(2)
        assert not made.is_inference()
