"""What docs/theory claims, held to naive enumerations of a still smaller world, and its page to its script."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from docs.theory import toy
from rgtg_fast.training.losses import Objective

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "theory" / "README.md"
V, N = 3, 3
BETA = 1.4
ANSWERS = list(itertools.product(range(V), repeat=N))
Prefix = tuple[int, ...]


@pytest.fixture(scope="module")
def world() -> toy.World:
    return toy.make_world(seed=4, vocabulary=V, length=N)


def place(prefix: Prefix) -> int:
    """Where a prefix stands in its table."""
    return sum(token * V ** (len(prefix) - 1 - i) for i, token in enumerate(prefix))


def at(tables: toy.Tables, prefix: Prefix) -> float:
    return float(tables[len(prefix)][place(prefix)])


def mass(world: toy.World, prefix: Prefix) -> float:
    """π(prefix): what all answers weigh that begin with it."""
    return sum(float(world.base[place(y)]) for y in ANSWERS if y[: len(prefix)] == prefix)


def told_better(world: toy.World, a: Prefix, b: Prefix) -> float:
    """The chance to draw an answer that begins with a, then one that begins with b, and to hear the first preferred."""
    total = 0.0
    for y, z in itertools.product(ANSWERS, ANSWERS):
        if y[: len(a)] == a and z[: len(b)] == b:
            margin = float(world.reward[place(y)] - world.reward[place(z)])
            total += float(world.base[place(y)] * world.base[place(z)]) / (1 + math.exp(-margin))
    return total


def prefixes(length: int) -> list[Prefix]:
    return list(itertools.product(range(V), repeat=length))


def test_the_world_is_the_models(world: toy.World) -> None:
    """π of every answer from one forward over the whole text, and a true reward that averages to 0."""
    texts = torch.tensor([[toy.PROMPT, *answer] for answer in ANSWERS])
    with torch.inference_mode():
        logprobs = world.model(texts, use_cache=False).logits.log_softmax(-1)
    for row, answer in enumerate(ANSWERS):
        assert math.exp(
            sum(float(logprobs[row, i, token]) for i, token in enumerate(answer))
        ) == pytest.approx(float(world.base[place(answer)]), abs=1e-12)
    assert world.answers.tolist() == [list(answer) for answer in ANSWERS]
    assert float(world.base @ world.reward) == pytest.approx(0, abs=1e-12)
    assert float(world.wins.sum()) == pytest.approx(0.5, abs=1e-12)


def test_newton_finds_what_a_general_optimizer_finds() -> None:
    wins = torch.rand(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3 + 1e-3

    def loss(rewards: np.ndarray) -> float:
        margins = rewards[:, None] - rewards
        return float((wins.numpy() * np.logaddexp(0, -margins)).sum())

    found = optimize.minimize(loss, np.zeros(7), method="BFGS", options={"gtol": 1e-7}).x
    assert toy.bradley_terry(wins).numpy() == pytest.approx(found - found.mean(), abs=1e-5)


@pytest.mark.parametrize("length", range(N + 1))
def test_preferences_between_prefixes_are_those_of_their_answers(world: toy.World, length: int) -> None:
    wins = toy.prefix_wins(world.wins, V, length)
    for a, b in itertools.product(prefixes(length), prefixes(length)):
        assert float(wins[place(a), place(b)]) == pytest.approx(told_better(world, a, b), abs=1e-12)


def sampled(world: toy.World, count: int) -> torch.Tensor:
    """Answers as a data set would hold them, chosen and rejected in turn, as places `[2·count]`."""
    numbers = np.random.default_rng(0)
    drawn = numbers.integers(len(ANSWERS), size=(count, 2))
    margin = world.reward[drawn[:, 0]] - world.reward[drawn[:, 1]]
    first = numbers.random(count) < torch.sigmoid(margin).numpy()
    return torch.from_numpy(np.where(first[:, None], drawn, drawn[:, ::-1]).copy()).flatten()


@pytest.mark.parametrize("name", ["partial_bt", "full_bt"])
def test_the_trainers_losses_have_these_minima(world: toy.World, name: str) -> None:
    """On one data set: this package's loss has no gradient at the tables, and full_bt none at any prefix, ever."""
    answers = sampled(world, 6000)
    tables = toy.arbitrary(world, seed=3)
    for i in range(1, N + 1) if name == "partial_bt" else [N]:
        counts = torch.zeros(V**i, V**i, dtype=torch.float64)
        cut = answers // V ** (N - i)
        counts.index_put_((cut[::2], cut[1::2]), torch.ones(()).double(), accumulate=True)
        tables[i] = toy.bradley_terry(counts)
    leaves = [table.clone().requires_grad_() for table in tables]
    rewards = torch.stack([leaves[i][answers // V ** (N - i)] for i in range(1, N + 1)], 1).flatten()
    Objective(name, mode="truncate").loss(rewards, torch.arange(0, len(rewards) + 1, N)).backward()
    for i in range(1, N + 1):
        gradient = leaves[i].grad
        assert gradient is not None
        if name == "full_bt" and i < N:
            assert gradient.count_nonzero() == 0
        else:
            assert float(gradient.abs().max()) < 1e-14
            assert float(tables[i].std()) > 0.1


def test_whole_answers_get_the_true_reward_from_both_losses(world: toy.World) -> None:
    for tables in (toy.full_bt(world, toy.arbitrary(world, 0)), toy.partial_bt(world)):
        apart = tables[-1] - world.reward
        assert float((apart - apart.mean()).abs().max()) < 1e-10


def naive_policy(world: toy.World, reward: toy.Tables, beta: float) -> dict[Prefix, float]:
    """Guided decoding, step by step."""
    policy = {(): 1.0}
    for i in range(N):
        grown = {}
        for prefix, probability in policy.items():
            weights = [
                float(world.conditionals[i][place(prefix), v]) * math.exp(beta * at(reward, (*prefix, v)))
                for v in range(V)
            ]
            for v in range(V):
                grown[(*prefix, v)] = probability * weights[v] / sum(weights)
        policy = grown
    return policy


def test_guided_decoding_and_the_ratio_of_two_policies(world: toy.World) -> None:
    """p(y_i | x, y_<i) ∝ π_i(y_{1:i}) / π_{i−1}(y_<i), each normalised over the answers of its length."""
    partial = toy.partial_bt(world)
    policy = toy.guided(world, partial, BETA)
    naive = naive_policy(world, partial, BETA)
    assert policy.tolist() == pytest.approx([naive[answer] for answer in ANSWERS], abs=1e-12)

    def rlhf(length: int) -> dict[Prefix, float]:
        weights = {p: mass(world, p) * math.exp(BETA * at(partial, p)) for p in prefixes(length)}
        return {p: weight / sum(weights.values()) for p, weight in weights.items()}

    for i in range(1, N + 1):
        longer, shorter = rlhf(i), rlhf(i - 1)
        assert toy.rlhf_at(world, partial, BETA, i).tolist() == pytest.approx(
            list(longer.values()), abs=1e-12
        )
        for prefix in prefixes(i - 1):
            ratio = [longer[(*prefix, v)] / shorter[prefix] for v in range(V)]
            step = [sum(naive[y] for y in ANSWERS if y[:i] == (*prefix, v)) for v in range(V)]
            assert [r / sum(ratio) for r in ratio] == pytest.approx([s / sum(step) for s in step], abs=1e-12)


def test_free_prefixes_make_any_policy(world: toy.World) -> None:
    """With the full-sequence loss at its minimum, all tokens but the last are drawn as the wanted policy draws them."""
    wanted = toy.rlhf(world, -BETA)
    tables = toy.full_bt(world, toy.realising(world, wanted, BETA))
    policy = toy.guided(world, tables, BETA)
    for prefix in prefixes(N - 1):
        of = [place(y) for y in ANSWERS if y[: N - 1] == prefix]
        assert float(policy[of].sum()) == pytest.approx(float(wanted[of].sum()), abs=1e-12)
    assert toy.accuracy(world, tables)[-1] == pytest.approx(toy.ceiling(world)[-1], abs=1e-12)
    assert float(policy @ world.reward) < -0.3


def test_prefixes_of_the_partial_loss_are_ordered_by_win_rate(world: toy.World) -> None:
    partial = toy.partial_bt(world)
    for i in range(1, N + 1):
        masses = {p: mass(world, p) for p in prefixes(i)}
        rates = {}
        for a in prefixes(i):
            rates[a] = sum(told_better(world, a, b) for b in prefixes(i)) / masses[a]
            rising = sum(masses[b] / (1 + math.exp(at(partial, b) - at(partial, a))) for b in prefixes(i))
            assert rising == pytest.approx(rates[a], abs=1e-12)
        by_reward = sorted(prefixes(i), key=lambda p: at(partial, p))
        assert by_reward == sorted(prefixes(i), key=rates.__getitem__)


def test_guided_by_the_soft_value_is_the_rlhf_policy(world: toy.World) -> None:
    optimum = toy.rlhf(world, BETA)
    weights = [float(world.base[place(y)]) * math.exp(BETA * float(world.reward[place(y)])) for y in ANSWERS]
    assert optimum.tolist() == pytest.approx([w / sum(weights) for w in weights], abs=1e-12)
    assert toy.guided(world, toy.soft_values(world, BETA), BETA).tolist() == pytest.approx(
        optimum.tolist(), abs=1e-12
    )
    # The partial-sequence model's is another one: nearer than noise, and not the same.
    partial = toy.kl(toy.guided(world, toy.partial_bt(world), BETA), optimum)
    noise = toy.kl(toy.guided(world, toy.full_bt(world, toy.arbitrary(world, 0)), BETA), optimum)
    assert 1e-3 < partial < noise


def test_expected_rewards(world: toy.World) -> None:
    tables = toy.expected_rewards(world)
    for i in range(N + 1):
        for prefix in prefixes(i):
            of = [place(y) for y in ANSWERS if y[:i] == prefix]
            mean = float(world.base[of] @ world.reward[of]) / mass(world, prefix)
            assert at(tables, prefix) == pytest.approx(mean, abs=1e-12)


def test_best_of_two(world: toy.World) -> None:
    policy = dict.fromkeys(ANSWERS, 0.0)
    for y, z in itertools.product(ANSWERS, ANSWERS):
        better = y if world.reward[place(y)] >= world.reward[place(z)] else z
        policy[better] += float(world.base[place(y)] * world.base[place(z)])
    assert toy.best_of(world, 2).tolist() == pytest.approx(list(policy.values()), abs=1e-12)
    assert toy.best_of(world, 1).tolist() == pytest.approx(world.base.tolist(), abs=1e-12)


def test_accuracy_and_the_most_it_can_be(world: toy.World) -> None:
    tables = toy.arbitrary(world, 5)
    tables[2][:4] = 0.25  # ties count one half
    for i, (share, most) in enumerate(zip(toy.accuracy(world, tables), toy.ceiling(world), strict=True), 1):
        right = best = total = 0.0
        for a, b in itertools.permutations(prefixes(i), 2):
            wins = told_better(world, a, b)
            total += wins
            right += wins * (0.5 if at(tables, a) == at(tables, b) else at(tables, a) > at(tables, b))
            best += max(wins, told_better(world, b, a)) / 2
        assert share == pytest.approx(right / total, abs=1e-12)
        assert most == pytest.approx(best / total, abs=1e-12)
    for share, most in zip(toy.accuracy(world, toy.partial_bt(world)), toy.ceiling(world), strict=True):
        assert share <= most + 1e-12


def test_reward_at_a_divergence(world: toy.World) -> None:
    found = toy.at_divergence(world, lambda beta: toy.rlhf(world, beta), 0.3)
    beta = float(optimize.brentq(lambda b: toy.kl(toy.rlhf(world, b), world.base) - 0.3, 0, 10))  # pyright: ignore
    assert found == pytest.approx(float(toy.rlhf(world, beta) @ world.reward), abs=1e-9)
    assert math.isnan(toy.at_divergence(world, lambda beta: world.base, 0.3))


def test_the_decoder_draws_from_the_enumerated_policy(world: toy.World) -> None:
    tables = toy.full_bt(world, toy.arbitrary(world, 1))
    seen = toy.draw(world, tables, BETA, 1500)
    assert toy.chi_square(seen, toy.guided(world, tables, BETA)) > 1e-3
    assert toy.chi_square(seen, world.base) < 1e-9


def test_chi_square() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    seen = torch.tensor([0] * 40 + [1] * 33 + [2] * 27)
    assert toy.chi_square(seen, policy) == pytest.approx(stats.chisquare([40, 33, 27], [50, 30, 20]).pvalue)


@pytest.mark.parametrize("objective", ["partial_bt", "full_bt"])
def test_a_network_learns_whole_answers(world: toy.World, objective: str) -> None:
    tables = toy.train_network(world, objective, seed=0, pairs=1024, steps=60, batch=128)
    assert [len(table) for table in tables] == [V**i for i in range(N + 1)]
    shares, most = toy.accuracy(world, tables), toy.ceiling(world)
    assert shares[-1] > 0.5 + 0.7 * (most[-1] - 0.5)
    if objective == "partial_bt":
        assert all(share > 0.5 + 0.7 * (top - 0.5) for share, top in zip(shares, most, strict=True))


def test_the_page_has_the_networks_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last section alone, whose numbers are read from a file; the others take long."""
    matplotlib = pytest.importorskip("matplotlib", reason="the figures need matplotlib (the train extra)")
    script = PAGE.with_name("partial_sequences.py")
    head, world, *others = script.read_text(encoding="utf-8").split("\n# ## ")
    assert (world.partition("\n")[0], others[-1].partition("\n")[0]) == ("The world", "Networks")
    copy = tmp_path / "README.md"
    text = PAGE.read_text(encoding="utf-8")
    emptied = re.sub(r"(<!-- networks:begin -->\n).*?(<!-- networks:end -->)", r"\1\2", text, flags=re.DOTALL)
    assert emptied != text
    copy.write_text(emptied, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(script), "--page", str(copy)])
    with matplotlib.rc_context():
        exec(compile("\n# ".join([head, world, others[-1]]), script, "exec"), {"__file__": str(script)})
    assert copy.read_text(encoding="utf-8") == text
    assert (tmp_path / "networks.svg").read_bytes() == PAGE.with_name("networks.svg").read_bytes()


@pytest.mark.slow
def test_the_page_has_the_numbers_and_figures_of_the_script(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figures need matplotlib (the train extra)")
    copy = tmp_path / "README.md"
    text = PAGE.read_text(encoding="utf-8")
    emptied = re.sub(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", r"\1\3", text, flags=re.DOTALL)
    assert emptied.count("\n|") < text.count("\n|")  # otherwise nothing is tested
    copy.write_text(emptied, encoding="utf-8")
    command = [sys.executable, "-m", "docs.theory.partial_sequences", "--page", str(copy)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert copy.read_text(encoding="utf-8") == text
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == set(re.findall(r"\]\((\w+\.svg)\)", text)) == {p.name for p in PAGE.parent.glob("*.svg")}
