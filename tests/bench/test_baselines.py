"""The baselines are equal to each other and to a naive decoder, and as large as they claim."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from transformers import LlamaForCausalLM

from rgtg_fast.bench import baselines
from rgtg_fast.errors import RGTGError
from tests.engine.host_reads import Guard

PROMPTS = [[5, 9, 33, 2, 17], [8, 8, 41, 50, 3]]
STEPS = 12


def naive(lm, rm, prompt, k, beta, new_tokens):
    """Guided greedy decoding straight from its formula: no cache, one candidate at a time."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(new_tokens):
            logprobs = lm(torch.tensor([tokens]), use_cache=False).logits[0, -1].double().log_softmax(-1)
            scores = {}
            for token in logprobs.argsort(descending=True)[:k].tolist():
                hidden = rm.model(torch.tensor([[*tokens, token]]), use_cache=False).last_hidden_state[0, -1]
                scores[token] = float(logprobs[token] + beta * rm.score(hidden).double())
            tokens.append(max(scores, key=lambda token: scores[token]))
    return tokens[len(prompt) :]


def naive_genarm(lm, second, prompt, beta, new_tokens):
    """GenARM straight from its formula: no cache, one prompt at a time, in float64."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(new_tokens):
            ids = torch.tensor([tokens])
            base, guide = (
                model(ids, use_cache=False).logits[0, -1].double().log_softmax(-1) for model in (lm, second)
            )
            tokens.append(int((base + beta * guide).argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def second(models):
    """Another language model over the same vocabulary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(models[0].config).eval()


@pytest.mark.parametrize("k", [1, 4, 60])
@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_all_guided_baselines_equal_the_naive_decoder(models, k, beta):
    lm, rm = models
    expected = [naive(lm, rm, prompt, k, beta, STEPS) for prompt in PROMPTS]
    for method in (baselines.args_replicated, baselines.pargs_serial):
        assert method(lm, rm, PROMPTS, k=k, beta=beta, new_tokens=STEPS).tokens == expected


def test_the_reward_changes_what_is_decoded(models):
    lm, rm = models
    guided = baselines.args_replicated(lm, rm, PROMPTS, k=10, beta=2.0, new_tokens=STEPS)
    assert guided.tokens != baselines.unguided(lm, PROMPTS, new_tokens=STEPS).tokens


@pytest.mark.parametrize("beta", [0.0, 0.7, 3.0])
def test_genarm_equals_its_formula_for_every_prompt_of_a_batch(models, second, beta):
    lm, _ = models
    expected = [naive_genarm(lm, second, prompt, beta, STEPS) for prompt in PROMPTS]
    assert baselines.genarm_published(lm, second, PROMPTS, beta=beta, new_tokens=STEPS).tokens == expected
    plain = baselines.unguided(lm, PROMPTS, new_tokens=STEPS).tokens
    assert (expected == plain) is (beta == 0.0)


def test_genarm_keeps_the_best_two_scores_of_every_step(models, second):
    lm, _ = models
    run = baselines.genarm_published(lm, second, PROMPTS, beta=0.7, new_tokens=STEPS)
    for prompt, tokens, record in zip(PROMPTS, run.tokens, run.steps, strict=True):
        assert [int(candidates[0]) for candidates, _ in record] == tokens
        ids = torch.tensor([[*prompt, *tokens[:3]]])
        with torch.inference_mode():
            base, guide = (model(ids).logits[0, -1].log_softmax(-1) for model in (lm, second))
        expected = (base + 0.7 * guide).topk(2)
        torch.testing.assert_close(record[3][1], expected.values)
        assert record[3][0].tolist() == expected.indices.tolist()


def test_genarm_reads_nothing_on_the_host_between_prefill_and_end(models, second, monkeypatch):
    phase, stop = baselines.PhaseClock.phase, baselines.PhaseClock.stop
    watched, seen = ExitStack(), set()

    @contextmanager
    def noting(clock, name):
        seen.add(name)
        with phase(clock, name):
            yield
        if name == "prefill":
            watched.enter_context(Guard().watched())

    def stopping(clock):
        watched.close()
        return stop(clock)

    monkeypatch.setattr(baselines.PhaseClock, "phase", noting)
    monkeypatch.setattr(baselines.PhaseClock, "stop", stopping)
    baselines.genarm_published(models[0], second, PROMPTS, beta=1.0, new_tokens=4)
    assert seen == {"prefill", "topk", "reward", "resample", "lm"}


def test_without_reward_they_equal_transformers_greedy_generate(models):
    lm, rm = models
    plain = baselines.unguided(lm, PROMPTS, new_tokens=STEPS)
    assert baselines.args_replicated(lm, rm, PROMPTS, k=5, beta=0.0, new_tokens=STEPS).tokens == plain.tokens


def test_unguided_runs_past_the_end_of_sequence_and_leaves_the_model_as_it_was(models):
    lm, _ = models
    own = lm.generation_config
    first = baselines.unguided(lm, PROMPTS, new_tokens=1).tokens[0][0]
    own.eos_token_id, before = first, own.eos_token_id
    try:
        run = baselines.unguided(lm, PROMPTS, new_tokens=STEPS)
        assert [len(tokens) for tokens in run.tokens] == [STEPS, STEPS]
        assert lm.generation_config is own
        assert own.eos_token_id == first
    finally:
        own.eos_token_id = before


def test_the_record_of_scores_is_that_of_the_choice(models):
    lm, rm = models
    run = baselines.args_replicated(lm, rm, PROMPTS, k=7, beta=1.0, new_tokens=STEPS)
    for tokens, record in zip(run.tokens, run.steps, strict=True):
        assert [int(candidates[scores.argmax()]) for candidates, scores in record] == tokens


def test_caches_are_measured(models, second):
    lm, rm = models
    k, row = 6, 2 * 2 * 2 * 8 * 4  # keys and values, 2 layers, 2 groups, 8 numbers, float32
    length = len(PROMPTS[0]) + STEPS
    replicated = baselines.args_replicated(lm, rm, PROMPTS, k=k, beta=1.0, new_tokens=STEPS)
    assert replicated.cache_resident_bytes == {"lm": (length - 1) * row, "reward": k * length * row}
    # one of the 4 tensors is written anew beside its old self
    assert replicated.cache_peak_bytes["reward"] == k * length * row * 5 // 4
    serial = baselines.pargs_serial(lm, rm, PROMPTS, k=k, beta=1.0, new_tokens=2)
    assert serial.cache_resident_bytes["reward"] == 0
    both = baselines.genarm_published(lm, second, PROMPTS, beta=1.0, new_tokens=STEPS)
    assert both.cache_resident_bytes == dict.fromkeys(("lm", "reward"), 2 * (length - 1) * row)
    assert both.cache_peak_bytes == dict.fromkeys(("lm", "reward"), 2 * (length - 1) * row * 5 // 4)


def test_phases_account_for_the_whole_time(models, second):
    lm, rm = models
    for run in (
        baselines.args_replicated(lm, rm, PROMPTS, k=3, beta=1.0, new_tokens=STEPS),
        baselines.pargs_serial(lm, rm, PROMPTS, k=3, beta=1.0, new_tokens=3),
        baselines.genarm_published(lm, second, PROMPTS, beta=1.0, new_tokens=STEPS),
        baselines.unguided(lm, PROMPTS, new_tokens=STEPS),
    ):
        assert run.phases["prefill"] > 0
        assert sum(run.phases.values()) == pytest.approx(run.seconds)


def test_bad_input_is_refused_in_one_line(models, second):
    lm, rm = models
    with pytest.raises(RGTGError, match="new_tokens=0"):
        baselines.args_replicated(lm, rm, PROMPTS, k=3, beta=1.0, new_tokens=0)
    with pytest.raises(RGTGError, match="empty prompt"):
        baselines.pargs_serial(lm, rm, [[]], k=3, beta=1.0, new_tokens=1)
    with pytest.raises(RGTGError, match=r"lengths \[1, 2\]"):
        baselines.unguided(lm, [[1], [1, 2]], new_tokens=1)
    for prompts, tokens, message in (
        (PROMPTS, 0, "new_tokens=0"),
        ([[]], 1, "empty prompt"),
        ([[1], [1, 2]], 1, r"lengths \[1, 2\] differ: the genarm_published"),
    ):
        with pytest.raises(RGTGError, match=message):
            baselines.genarm_published(lm, second, prompts, beta=1.0, new_tokens=tokens)
