"""resample: the noise against published vectors, the draws against the distribution they claim."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rgtg_fast import RGTGError
from rgtg_fast.ops import _extension, resample, use_backend
from rgtg_fast.ops.resample import gumbel, philox

BACKENDS = ["reference"] if _extension.missing_reason() else ["reference", "cpp"]
INF, NAN = math.inf, math.nan


def draw(logprobs, rewards=None, beta=1.0, temperature=1.0, seed=0, position=0):
    """One row, or several where logprobs is a tensor [B, K]."""
    logprobs = torch.as_tensor(logprobs, dtype=torch.float32)
    logprobs = logprobs[None] if logprobs.ndim == 1 else logprobs
    rewards = (
        torch.zeros_like(logprobs)
        if rewards is None
        else torch.as_tensor(rewards, dtype=torch.float32).view_as(logprobs)
    )
    B = len(logprobs)

    def column(x, dtype):
        return torch.as_tensor(x, dtype=dtype).expand(B).contiguous()

    return resample(
        logprobs,
        rewards,
        column(beta, torch.float32),
        column(temperature, torch.float32),
        column(seed, torch.int64),
        column(position, torch.int64),
    )


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        # Known answers of philox4x32-10 as the authors of Random123 publish them.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, want):
    got = philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(x) for x in got) == want


@pytest.mark.parametrize(
    ("seed", "position"), [(0, 0), (-1, -1), (0x123456789ABCDEF, 0x7EDCBA987654321), (5, 1 << 40)]
)
def test_noise_follows_its_definition(seed, position):
    """Bit by bit in plain Python, with the float32 roundings of the specification."""
    noise = gumbel(torch.tensor([seed]), torch.tensor([position]), 10)[0]
    for j in range(10):
        words = philox(
            (
                torch.tensor(j // 4),
                torch.tensor(position & 0xFFFFFFFF),
                torch.tensor(position >> 32 & 0xFFFFFFFF),
                torch.tensor(0),
            ),
            (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF)),
        )
        v = min((torch.tensor(int(words[j % 4])).float().item() + 0.5) / 2**32, 1 - 2**-24)
        assert noise[j].item() == pytest.approx(-math.log(-math.log1p(-v)), rel=1e-5, abs=1e-5)


def test_noise_is_gumbel_distributed():
    noise = gumbel(torch.arange(200), torch.zeros(200, dtype=torch.int64), 100).flatten()
    assert noise.isfinite().all()
    assert stats.kstest(noise.double().numpy(), "gumbel_r").pvalue > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(backend, temperature):
    n, K = 30000, 12
    random = torch.Generator().manual_seed(7)
    logprobs, rewards = torch.randn(K, generator=random).log_softmax(-1), torch.randn(K, generator=random)
    with use_backend(backend):
        choice, logprob = draw(
            logprobs.expand(n, K),
            rewards.expand(n, K).contiguous(),
            1.5,
            temperature,
            seed=11,
            position=torch.arange(n),
        )
    p = ((logprobs.double() + 1.5 * rewards.double()) / temperature).softmax(-1)
    counts = torch.bincount(choice, minlength=K)
    assert stats.chisquare(counts.numpy(), (n * p).numpy()).pvalue > 1e-4
    torch.testing.assert_close(logprob.double(), p.log()[choice], rtol=0, atol=4e-6)


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("K", [1, 3, 4, 5, 63, 64, 65, 255, 256, 257, 5000])
def test_backends_choose_the_same(K):
    random = torch.Generator().manual_seed(K)
    B = 200 if K < 1000 else 20
    logprobs = torch.randn(B, K, generator=random).log_softmax(-1)
    rewards = torch.randn(B, K, generator=random)
    seeds = torch.randint(-(2**62), 2**62, (B,), generator=random)
    arguments = (logprobs, rewards, 1.0, 0.7, seeds, torch.arange(B) * 0x300000001)
    with use_backend("reference"):
        want, want_logprob = draw(*arguments)
    with use_backend("cpp"):
        got, got_logprob = draw(*arguments)
    assert torch.equal(got, want)
    torch.testing.assert_close(got_logprob, want_logprob, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@given(scores=st.lists(st.sampled_from([-INF, -2.0, 0.0, 0.0, 1.0]), min_size=1, max_size=40))
@settings(deadline=None, max_examples=80)
def test_zero_temperature_is_the_first_argmax(backend, scores):
    with use_backend(backend):
        choice, logprob = draw(scores, temperature=0.0)
    if max(scores) == -INF:
        assert choice.item() == -1
        assert logprob.isnan().all()
    else:
        assert choice.item() == scores.index(max(scores))
        assert logprob.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    kept=st.lists(st.booleans(), min_size=1, max_size=300).filter(any),
    temperature=st.sampled_from([0.0, 1e-38, 0.3, 1.0, 1e30]),
    seed=st.integers(-(2**63), 2**63 - 1),
    reward=st.sampled_from([0.0, 5.0, INF, -INF]),
)
@settings(deadline=None, max_examples=150)
def test_excluded_candidates_are_never_chosen(backend, kept, temperature, seed, reward):
    logprobs = [-1.0 if keep else -INF for keep in kept]
    rewards = [0.1 if keep else reward for keep in kept]
    with use_backend(backend):
        choice, logprob = draw(logprobs, rewards, 1.0, temperature, seed)
    assert kept[choice.item()]
    assert logprob.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_a_number_is_never_silent(backend, temperature):
    logprobs = torch.tensor(
        [
            [-1.0, -2.0, -INF],
            [-1.0, NAN, -2.0],
            [-1.0, -2.0, -INF],
            [-1.0, -2.0, -3.0],
            [-INF] * 3,
            [-1.0] * 3,
        ]
    )
    rewards = torch.tensor(
        [[0.0, NAN, 0.0], [0.0] * 3, [0.0, 0.0, NAN], [0.0, INF, 0.0], [0.0] * 3, [NAN] * 3]
    )
    beta = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    with use_backend(backend):
        choice, logprob = draw(logprobs, rewards, beta, temperature)
    assert choice[:5].tolist() == [-1] * 5
    assert logprob[:5].isnan().all()
    # beta = 0 ignores its rewards.
    assert choice[5] >= 0
    assert logprob[5].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draw_depends_on_its_own_seed_and_position_alone(backend):
    random = torch.Generator().manual_seed(3)
    logprobs = torch.randn(50, 10, generator=random)
    seeds, positions = torch.randint(0, 1 << 40, (50,), generator=random), torch.arange(50)
    with use_backend(backend):
        choice, logprob = draw(logprobs, seed=seeds, position=positions)
        order = torch.randperm(50, generator=random)
        shuffled = draw(logprobs[order], seed=seeds[order], position=positions[order])
    assert torch.equal(shuffled[0], choice[order])
    assert torch.equal(shuffled[1], logprob[order])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [-0.5, INF, NAN])
def test_a_bad_temperature_is_named(backend, temperature):
    with (
        use_backend(backend),
        pytest.raises(RGTGError, match=r"temperature\[1\]=.* is not a finite number >= 0"),
    ):
        draw(torch.zeros(2, 3), temperature=torch.tensor([1.0, temperature]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 0)}, r"logprobs have shape \[2, 0\]: use \[B, K\] with K >= 1"),
        ({1: torch.zeros(2, 4)}, r"rewards has shape \[2, 4\]: use \[B, K\] = \[2, 3\]"),
        ({1: torch.zeros(2, 3).double()}, "rewards has dtype torch.float64: use torch.float32"),
        ({2: torch.zeros(3)}, r"beta has shape \[3\]: use \[B\] = \[2\]"),
        ({4: torch.zeros(2)}, "seed has dtype torch.float32: use torch.int64"),
    ],
)
def test_bad_input_is_one_line(change, message):
    zero = torch.zeros(2, dtype=torch.int64)
    arguments = [torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), zero, zero]
    for i, x in change.items():
        arguments[i] = x
    with pytest.raises(RGTGError, match=message) as error:
        resample(*arguments)
    assert "\n" not in str(error.value)
