"""Steps that run ahead of the host: no host read in them, and the same rows, one step late."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from rgtg_fast import (
    AutoregressiveReward,
    ContrastiveReward,
    FunctionReward,
    Guidance,
    LogRatioReward,
    MixtureReward,
    RADReward,
    RewardGuidedDecoder,
    RewardNaNError,
    RGTGError,
    SequenceReward,
    VocabularyReward,
)
from rgtg_fast.engine import scheduler as scheduler_module
from rgtg_fast.engine.batch import Batch
from rgtg_fast.engine.graphs import StepGraphs, Tensors, bucket
from rgtg_fast.engine.step import DecodeStep
from rgtg_fast.models import device as device_module
from rgtg_fast.models import runner as runner_module
from rgtg_fast.rewards import mixture as mixture_module
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.covering import daily
from tests.engine.host_reads import Guard, HostReadError
from tests.engine.support import prompts_of
from tests.models.adapters import write_adapter

TOKENIZER = make_tokenizer()
SAMPLED, GREEDY = Guidance(k=5, beta=1.0, temperature=0.9), Guidance(k=5, beta=1.0, temperature=0)


def _sequence() -> SequenceReward:
    return SequenceReward((make_rm(), TOKENIZER))


GUIDES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "sequence": _sequence,
    "rad": lambda: RADReward((make_rm(), TOKENIZER)),
    "contrastive": lambda: ContrastiveReward("w1 w2", "w3"),
    "farma": lambda: VocabularyReward((make_lm(3), TOKENIZER)),
    "genarm": lambda: AutoregressiveReward((make_lm(4), TOKENIZER)),
    "eft": lambda: LogRatioReward((make_lm(5), TOKENIZER), (make_lm(6), TOKENIZER)),
    "mixture": lambda: MixtureReward([_sequence(), ContrastiveReward("w1", "w2")], [1.0, 0.5]),
}
SUPPORTS = [
    (name, support)
    for name in GUIDES
    for support in ("lm", "combined", "all")
    if support == "lm" or name in ("contrastive", "farma", "genarm", "eft")
]


def over(*values: Any) -> list[Any]:
    """Every guide and support with every value; the default run has every two of them together."""
    return daily([(*pair, value) for pair, value in product(SUPPORTS, values)])


def make_decoder(
    guide: str, max_batch: int = 3, engine: str = "transformers", pad_batch: bool = False, **lm: Any
) -> RewardGuidedDecoder:
    model = make_lm(**lm)
    # Many tokens end an answer, so that rows leave at different steps.
    model.generation_config.eos_token_id = [1, *range(8, 64, 7)]
    return RewardGuidedDecoder.from_pretrained(
        (model, TOKENIZER), reward=GUIDES[guide](), max_batch=max_batch, engine=engine, pad_batch=pad_batch
    )


class EagerRecorder:
    """What CUDA graphs do, without them: a replay runs the step as it was recorded and writes into the same tensors.

    The step's Python code runs in a replay too, so what it counts is taken back.
    """

    def __init__(self, decoder: RewardGuidedDecoder):
        self.decoder = decoder

    def forget(self) -> None:
        pass

    def warm_up(self, step: Callable[[], object]) -> None:
        step()

    def record(self, step: Any, batch: Batch, trace: bool) -> Callable[[], Tensors]:
        frozen = copy.copy(batch)
        outputs = step(frozen, trace)

        def replay() -> Tensors:
            scheduler = self.decoder._scheduler
            models, reward = scheduler.models(), scheduler.reward
            counters = [self.decoder.lm.runner.counter, *reward.counters()]
            lengths, counts = [m.lengths for m in models], [(c.calls, c.tokens) for c in counters]
            for output, new in zip(outputs, step(frozen, trace), strict=True):
                output.copy_(new)
            for model, old in zip(models, lengths, strict=True):
                model.lengths = old
            for counter, (calls, tokens) in zip(counters, counts, strict=True):
                counter.calls, counter.tokens = calls, tokens
            return outputs

        return replay


def recorded(decoder: RewardGuidedDecoder) -> StepGraphs:
    """Makes a decoder on the CPU replay recorded steps, one ahead of the host, as one on CUDA does."""
    scheduler = decoder._scheduler
    graphs = StepGraphs(scheduler.execute, decoder.lm.runner, scheduler.reward, EagerRecorder(decoder))
    scheduler.graphs, decoder.max_in_flight = graphs, 1
    return graphs


def as_numbers(rows: Any) -> list[Any]:
    return [(row.tokens, row.text, row.finish_reason, row.end_token) for row in rows]


# ---- no host read -----------------------------------------------------------------------------------------------


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Guard:
    """Allows what a GPU copies without the host: the decisions to it, and prompts from it."""
    guard = Guard()
    monkeypatch.setattr(device_module.AsyncCopy, "__init__", guard.allowed(device_module.AsyncCopy.__init__))
    monkeypatch.setattr(scheduler_module, "decisions_of", guard.allowed(scheduler_module.decisions_of))
    monkeypatch.setattr(scheduler_module, "write_trace", guard.allowed(scheduler_module.write_trace))
    for module in (scheduler_module, runner_module, mixture_module):
        monkeypatch.setattr(module, "to_device", guard.allowed(device_module.to_device))
    return guard


@pytest.mark.parametrize(("guide", "support", "trace"), over(False, True))
def test_the_host_reads_nothing_but_decisions(guide: str, support: str, trace: bool, guard: Guard) -> None:
    """Rows of several k end, leave and are replaced under the guard."""
    decoder = make_decoder(guide)
    decoder.max_in_flight = 1
    prompts = prompts_of(6)
    guidance = [Guidance(3 + i % 2, 1.0, 0.9, support=support) for i in range(6)]
    want = decoder.generate(prompts, 6, guidance, seed=list(range(6)), trace=trace)
    with guard.watched():
        got = decoder.generate(prompts, 6, guidance, seed=list(range(6)), trace=trace)
    assert as_numbers(got) == as_numbers(want)


@pytest.mark.parametrize("shares", [True, False])
def test_an_adapter_reads_nothing_either(shares: bool, guard: Guard, tmp_path: Path) -> None:
    model = make_lm()
    guide = SequenceReward(write_adapter(tmp_path / "guide", model, fork=1), share_trunk=shares)
    decoder = RewardGuidedDecoder.from_pretrained(
        (model, TOKENIZER), guide, max_batch=2, engine="transformers"
    )
    decoder.max_in_flight = 1
    want = decoder.generate(prompts_of(4), 6, SAMPLED, seed=[1, 2, 3, 4])
    with guard.watched():
        got = decoder.generate(prompts_of(4), 6, SAMPLED, seed=[1, 2, 3, 4])
    assert as_numbers(got) == as_numbers(want)


def test_the_guard_sees_what_reads() -> None:
    x = torch.arange(4)
    reads: list[Callable[[], object]] = [
        lambda: x.tolist(),
        lambda: x.sum().item(),
        lambda: int(x[0]),
        lambda: bool((x > 1).any()),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: torch.tensor([1, 2]),
        lambda: torch.where(x > 1),
    ]
    for read in reads:
        with pytest.raises(HostReadError), Guard().watched():
            read()


def test_a_function_reads_and_so_waits_for_no_step(guard: Guard) -> None:
    decoder = RewardGuidedDecoder.from_pretrained(
        (make_lm(), TOKENIZER), FunctionReward(lambda prefixes, candidates: torch.tensor(candidates.tolist()))
    )
    decoder.max_in_flight = 1
    with pytest.raises(HostReadError), guard.watched():
        decoder.generate(prompts_of(1), 3, GREEDY)


# ---- one step late ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guide", "support", "temperature", "engine"),
    daily([(*pair, *rest) for pair, *rest in product(SUPPORTS, (0, 0.9), ("auto", "transformers"))]),
)
def test_the_rows_are_those_of_a_host_that_keeps_up(
    guide: str, support: str, temperature: float, engine: str
) -> None:
    prompts, seeds = prompts_of(7), list(range(7))
    guidance = [Guidance(3 + i % 3, 1.0, temperature, support=support) for i in range(7)]
    want = make_decoder(guide, engine=engine).generate(prompts, 9, guidance, seeds)
    late = make_decoder(guide, engine=engine)
    late.max_in_flight = 1
    replayed = make_decoder(guide, engine=engine)
    graphs = recorded(replayed)
    assert {row.finish_reason for row in want} == {"eos", "length"}
    for decoder in (late, replayed):
        for _ in range(2):
            got = decoder.generate(prompts, 9, guidance, seeds)
            assert as_numbers(got) == as_numbers(want)
            for a, b in zip(got, want, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
                assert a.rewards == pytest.approx(b.rewards, abs=1e-4)
                assert a.guided_logprob == pytest.approx(b.guided_logprob, abs=1e-4)
            assert got.stats.tokens == want.stats.tokens
    assert len(graphs) > 0


@pytest.mark.parametrize("graphed", [False, True])
def test_stop_strings_and_streams(graphed: bool) -> None:
    prompt, plain = prompts_of(1)[0], make_decoder("sequence")
    plain.lm.runner.model.generation_config.eos_token_id = []
    text = plain.generate(prompt, 12, SAMPLED, seed=3)[0].text
    stop = " ".join(text.split()[3:5])
    decoder = make_decoder("sequence")
    decoder.lm.runner.model.generation_config.eos_token_id = []
    decoder.max_in_flight = 1
    if graphed:
        recorded(decoder)
    for stops in (None, stop):
        row = plain.generate(prompt, 12, SAMPLED, seed=3, stop=stops)[0]
        assert as_numbers(decoder.generate(prompt, 12, SAMPLED, seed=3, stop=stops)) == as_numbers([row])
        want = list(plain.stream(prompt, 12, SAMPLED, seed=3, stop=stops))
        got = list(decoder.stream(prompt, 12, SAMPLED, seed=3, stop=stops))
        assert [(p.text, p.token, p.finish_reason) for p in got] == [
            (p.text, p.token, p.finish_reason) for p in want
        ]
        for a, b in zip(got, want, strict=True):
            assert [c.token for c in a.candidates] == [c.token for c in b.candidates]
            assert [c.probability for c in a.candidates] == pytest.approx(
                [c.probability for c in b.candidates], abs=1e-5
            )
    assert row.finish_reason == "stop"


def test_iterate_gives_rows_as_they_finish() -> None:
    decoder = make_decoder("sequence")
    recorded(decoder)
    want = make_decoder("sequence").generate(prompts_of(9), 8, SAMPLED, seed=list(range(9)))
    rows = dict(decoder.iterate(prompts_of(9), 8, SAMPLED, seed=list(range(9))))
    assert as_numbers([rows[i] for i in range(9)]) == as_numbers(want)


def test_no_step_is_run_that_no_row_wants() -> None:
    """All rows end by length: the host knows, and as many steps run as without a step ahead."""
    decoder = make_decoder("sequence")
    decoder.lm.runner.model.generation_config.eos_token_id = []
    want = decoder.generate(prompts_of(3), 5, GREEDY).stats
    decoder.max_in_flight = 1
    got = decoder.generate(prompts_of(3), 5, GREEDY).stats
    assert (got.steps, got.lm_calls, got.lm_tokens, got.reward_tokens) == (
        want.steps,
        want.lm_calls,
        want.lm_tokens,
        want.reward_tokens,
    )


def test_a_nan_reward_is_seen_one_step_late() -> None:
    decoder = make_decoder("sequence")
    guide = decoder.reward
    score, calls = guide.score, []

    def sometimes(candidates: torch.Tensor) -> torch.Tensor:
        calls.append(len(candidates))
        rewards = score(candidates)
        return rewards.index_fill(1, torch.tensor([2]), torch.nan) if len(calls) == 4 else rewards

    guide.score = sometimes
    decoder.lm.runner.model.generation_config.eos_token_id = []
    decoder.max_in_flight = 1
    with pytest.raises(RewardNaNError, match="step 3") as raised:
        decoder.generate(prompts_of(2), 8, GREEDY)
    assert raised.value.finished == []


# ---- recorded steps ---------------------------------------------------------------------------------------------


def test_graphs_are_kept_for_their_shapes_and_dropped_with_their_memory() -> None:
    decoder = make_decoder("sequence", max_batch=4)
    decoder.lm.runner.model.generation_config.eos_token_id = []
    graphs = recorded(decoder)
    decoder.generate([[7, 8]] * 4, 3, GREEDY)
    assert len(graphs) == 1
    decoder.generate([[7, 8]] * 4, 3, Guidance(k=5, beta=-2.0, temperature=0.5), seed=5)
    assert len(graphs) == 1, "β, temperature and seed are no part of a graph"
    decoder.generate([[7, 8]] * 4, 3, Guidance(k=6, temperature=0))
    assert len(graphs) == 2
    decoder.generate([[7, 8]] * 4, 30, GREEDY)
    assert len(graphs) == 1, "the caches have grown and moved"
    decoder.generate([[7, 8]] * 2, 3, GREEDY)
    assert len(graphs) == 2


@pytest.mark.parametrize("guide", ["none", "sequence", "farma", "mixture"])
def test_a_replay_counts_what_the_step_counts(guide: str) -> None:
    decoder, plain = make_decoder(guide), make_decoder(guide)
    for each in (decoder, plain):
        each.lm.runner.model.generation_config.eos_token_id = []
    recorded(decoder)
    want = plain.generate(prompts_of(3), 6, SAMPLED).stats
    decoder.generate(prompts_of(3), 6, SAMPLED)
    got = decoder.generate(prompts_of(3), 6, SAMPLED).stats
    for name in ("steps", "lm_calls", "lm_tokens", "reward_calls", "reward_tokens", "prompt_tokens_reward"):
        assert getattr(got, name) == getattr(want, name), name
    assert got.first_token_seconds is not None


def test_surplus_rows_of_a_bucket_change_nothing() -> None:
    """Five rows run in a graph of eight; the three others stand still."""
    decoder, plain = make_decoder("sequence", max_batch=8), make_decoder("sequence", max_batch=8)
    recorded(decoder)
    prompts, seeds = prompts_of(11, seed=4), list(range(11))
    want = plain.generate(prompts, 12, SAMPLED, seeds)
    decoder.generate(prompts_of(8), 20, SAMPLED)  # leaves prefixes behind
    assert as_numbers(decoder.generate(prompts, 12, SAMPLED, seeds)) == as_numbers(want)


@pytest.mark.parametrize(
    ("rows", "slots", "size"), [(1, 8, 1), (3, 8, 4), (5, 6, 6), (9, 64, 16), (33, 64, 40)]
)
def test_buckets(rows: int, slots: int, size: int) -> None:
    assert bucket(rows, slots) == size


def test_graphs_need_cuda_and_say_so() -> None:
    with pytest.raises(RGTGError, match="graphs=True and the models are on cpu: leave graphs out"):
        RewardGuidedDecoder.from_pretrained((make_lm(), TOKENIZER), graphs=True, device="cpu")
    assert make_decoder("none").describe()["graphs"] is False


@pytest.mark.parametrize("guide", ["none", "sequence", "farma"])
def test_rows_that_have_ended_stand_still(guide: str) -> None:
    """No prefix grows after its row's end, but by the step that had begun then and a follower's token that ends it."""
    lengths = []
    for replays in (False, True):
        decoder = make_decoder(guide, max_batch=4)
        if replays:
            recorded(decoder)
        rows = decoder.generate(prompts_of(4), 25, Guidance(5, 1.0, 0.9), seed=list(range(4)))
        models = [decoder.lm.runner, *(decoder.reward.models() if decoder.reward else [])]
        lengths.append(torch.stack([model.step_state()[0] for model in models]))
    assert max(len(row.tokens) for row in rows) > 4 + min(len(row.tokens) for row in rows)
    late = lengths[1] - lengths[0]
    assert late[0].max() <= 1
    assert late.max() <= (2 if guide == "farma" else 1)


# ---- padded batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guide", "support", "graphs"), over(True, False))
def test_a_padded_batch_always_has_all_its_rows_and_gives_the_same(
    guide: str, support: str, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, guidance, seeds = prompts_of(5), Guidance(4, 1.0, 0.9, support=support), list(range(5))
    want = make_decoder(guide).generate(prompts, 8, guidance, seeds)
    decoder = make_decoder(guide, pad_batch=True)
    if graphs:
        recorded(decoder)
    seen: set[int] = set()
    forward = DecodeStep.forward
    monkeypatch.setattr(
        DecodeStep, "forward", lambda step, batch: (seen.add(batch.width), forward(step, batch))[1]
    )
    assert as_numbers(decoder.generate(prompts, 8, guidance, seeds)) == as_numbers(want)
    alone = [
        decoder.generate([prompt], 8, guidance, seed)[0] for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert as_numbers(alone) == as_numbers(want)
    assert seen == {decoder.max_batch}


def test_a_gate_is_not_padded() -> None:
    prompts, guidance, seeds = prompts_of(5), Guidance(4, 1.0, 0.9, gate_entropy=2.5), list(range(5))
    want = make_decoder("sequence").generate(prompts, 8, guidance, seeds)
    got = make_decoder("sequence", pad_batch=True).generate(prompts, 8, guidance, seeds)
    assert as_numbers(got) == as_numbers(want)
