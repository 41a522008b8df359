# %% [markdown]
# # A reward model that was never trained on prefixes
#
# Makes the figures and the numbers of README.md, which has the text and the proofs. Each cell needs those before it.
# `python -m docs.theory.partial_sequences` (from the root of the repository) runs all of them in half a minute;
# `--networks` also trains the networks of the last section again, which takes some minutes.

# %%
import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.figure import Figure

from benchmarks.harness import append, read
from benchmarks.report.pages import write_block
from docs.theory import toy

parser = argparse.ArgumentParser(description="Makes the figures and the numbers of docs/theory/README.md.")
parser.add_argument("--page", type=Path, default=Path(__file__).with_name("README.md"))
parser.add_argument("--networks", action="store_true", help="train the networks again")
given, _ = parser.parse_known_args()

FOLDER = given.page.parent
NETWORKS = Path(__file__).with_name("networks.csv")
BLUE, RED, GREEN, PINK, GREY, BLACK = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f7f7f", "#222222"
# The same input gives the same file: no random ids, no dates.
rcParams.update({"svg.hashsalt": "rgtg-fast", "svg.fonttype": "none", "font.size": 9})


def save(figure: Figure, name: str) -> None:
    figure.savefig(FOLDER / name, metadata={"Date": None})


# %% [markdown]
# ## The world
# Four tokens, answers of five tokens: 1,024 answers and 1,364 prefixes. Everything below is enumerated in float64.

# %%
world = toy.make_world(seed=0)
tokens = range(1, world.length + 1)
BETA = 1.0
prefix_value = toy.expected_rewards(world)

# %% [markdown]
# ## Three reward models with the same whole answers
# All of them minimise the full-sequence Bradley-Terry loss; the third minimises the partial-sequence one as well.

# %%
worst_case = toy.full_bt(world, toy.realising(world, toy.rlhf(world, -BETA), BETA))
some_case = toy.full_bt(world, toy.arbitrary(world, seed=1))
partial = toy.partial_bt(world)
models = {
    "full-sequence loss, prefixes noise": some_case,
    "full-sequence loss, prefixes mislead": worst_case,
    "partial-sequence loss": partial,
}

# %%
figure = Figure(figsize=(9, 3.3), layout="constrained")
for axis, (title, tables) in zip(figure.subplots(1, 3, sharey=True), models.items(), strict=True):
    for i, colour in zip(range(1, world.length + 1), (PINK, RED, GREEN, BLUE, BLACK), strict=True):
        x, y = (table[i] - table[i].mean() for table in (prefix_value, tables))
        # Of the many long ones a part is enough.
        x, y = (values[:: max(1, len(values) // 128)] for values in (x, y))
        axis.scatter(x, y, s=14 if i < 4 else 6, color=colour, alpha=0.7, linewidths=0, label=f"{i}")
    axis.set(title=title.replace(", ", ",\n"), xlabel="E[r* | prefix], centred by length")
    axis.set_ylim(-8, 8)
    axis.grid(alpha=0.3)
figure.axes[0].set_ylabel("the model's reward")
figure.axes[0].legend(title="tokens read", fontsize=8, markerscale=1.5, loc="lower right")
save(figure, "prefix_rewards.svg")

# %% [markdown]
# ## What decoding does with them

# %%
betas = np.linspace(0, 4, 33)
policies = {
    "RLHF policy π e^{βr*}": lambda beta: toy.rlhf(world, beta),
    "partial-sequence loss": lambda beta: toy.guided(world, partial, beta),
    "full-sequence loss, prefixes 0": lambda beta: toy.guided(
        world, toy.full_bt(world, [torch.zeros_like(table) for table in partial]), beta
    ),
    "full-sequence loss, prefixes mislead": lambda beta: toy.guided(
        world, toy.full_bt(world, toy.realising(world, toy.rlhf(world, -beta), beta or 1.0)), beta
    ),
}
looks = dict(zip(policies, ((BLACK, "--"), (BLUE, "-"), (GREY, "-"), (RED, "-")), strict=True))
noise = [toy.full_bt(world, toy.arbitrary(world, seed)) for seed in range(200)]


def outcome(policy: torch.Tensor) -> tuple[float, float]:
    """E[r*] and KL(policy ‖ π)."""
    return float(policy @ world.reward), toy.kl(policy, world.base)


curves = {name: [outcome(policy(float(beta))) for beta in betas] for name, policy in policies.items()}
drawn = np.array([[outcome(toy.guided(world, tables, float(beta))) for beta in betas] for tables in noise])

# %%
figure = Figure(figsize=(9, 3.6), layout="constrained")
by_beta, by_kl = figure.subplots(1, 2)
low, middle, high = np.quantile(drawn[..., 0], (0.05, 0.5, 0.95), axis=0)
by_beta.fill_between(
    betas,
    low,
    high,
    color=PINK,
    alpha=0.2,
    linewidth=0,
    label="full-sequence loss, prefixes noise (90 % of 200)",
)
by_beta.plot(betas, middle, color=PINK)
for name, points in curves.items():
    rewards, divergences = zip(*points, strict=True)
    colour, style = looks[name]
    by_beta.plot(betas, rewards, style, color=colour, label=name)
    by_kl.plot(divergences, rewards, style, color=colour)
by_kl.plot(drawn[:20, ::4, 1].T, drawn[:20, ::4, 0].T, color=PINK, alpha=0.3, lw=0.8)
best = [outcome(toy.best_of(world, n)) for n in (1, 2, 4, 10, 30)]
by_kl.plot(
    *[[point[j] for point in best] for j in (1, 0)], "o-", ms=3, color=GREEN, label="best of n under r*"
)
for n, (reward, divergence) in zip((1, 2, 4, 10, 30), best, strict=True):
    by_kl.annotate(f"{n}", (divergence, reward), (4, -9), textcoords="offset points", fontsize=7, color=GREEN)
by_beta.set(xlabel="β", ylabel="expected true reward E[r*]")
by_kl.set(xlabel="KL to the base model, nats", xlim=(0, 4))
for axis in (by_beta, by_kl):
    axis.axhline(0, color=GREY, lw=0.8, ls=":")
    axis.grid(alpha=0.3)
    axis.set_ylim(-4, 5)
handles, labels = by_beta.get_legend_handles_labels()
for more, of_best in zip((handles, labels), by_kl.get_legend_handles_labels(), strict=True):
    more += of_best
figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
save(figure, "guided_reward.svg")

# %%
figure = Figure(figsize=(5.2, 3.6), layout="constrained")
axis = figure.subplots()
axis.plot(tokens, toy.ceiling(world), color="#c8d8e4", lw=6, label="the most that can be known")
for (name, tables), colour in zip(models.items(), (PINK, RED, BLUE), strict=True):
    axis.plot(tokens, toy.accuracy(world, tables), "o-", ms=4, color=colour, label=name)
axis.axhline(0.5, color=GREY, lw=0.8, ls=":")
axis.set(
    xlabel="tokens of both answers that are read", ylabel="preferred answer scored higher", ylim=(0.2, 0.9)
)
axis.set_xticks(list(tokens))
figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
axis.grid(alpha=0.3)
save(figure, "prefix_accuracy.svg")

# %% [markdown]
# ## The same in numbers, and what README.md claims, checked

# %%
soft_value = toy.soft_values(world, BETA)
optimum = toy.rlhf(world, BETA)
rows = [
    ("base model π", None, lambda beta: world.base),
    ("full-sequence loss, prefixes mislead", worst_case, None),
    ("full-sequence loss, prefixes noise (as drawn above)", some_case, None),
    ("partial-sequence loss", partial, None),
    ("regression onto r* (CD-FUDGE)", prefix_value, None),
    ("soft value (1/β) log E[e^{βr*}]", soft_value, policies["RLHF policy π e^{βr*}"]),
]
lines = [
    f"Sampled from the whole vocabulary at τ = 1, β = {BETA:g}; *at 1 nat*: with the β that leads 1 nat away from π.",
    "",
    "| each token by the rewards of | E[r*] | KL to π | KL to π e^{βr*} | E[r*] at 1 nat | right on 1 token | 3 tokens "
    "| whole answers |",
    "|---|--:|--:|--:|--:|--:|--:|--:|",
]
for name, tables, family in rows:
    family = family or (lambda beta, tables=tables: toy.guided(world, tables, beta))
    policy = world.base if tables is None else toy.guided(world, tables, BETA)
    # A rounded zero has no sign.
    numbers = (round(value, 3) + 0.0 for value in (*outcome(policy), toy.kl(policy, optimum)))
    cells = ["{:+.3f} | {:.3f} | {:.3f}".format(*numbers), "– | – | – | –"]
    if tables is not None:
        of_length = toy.accuracy(world, tables)
        known = " | ".join(f"{of_length[i - 1]:.3f}" for i in (1, 3, 5))
        cells[1] = f"{toy.at_divergence(world, family, 1.0):+.3f} | {known}"
    lines.append(f"| {name} | {' | '.join(cells)} |")
write_block(given.page, "\n".join(lines), "exact")
print("\n".join(lines))

# %%
# 1. The full-sequence loss gives prefixes no gradient, and whole answers r* up to a constant.
learned = worst_case[-1] - world.reward
assert (learned - learned.mean()).abs().max() < 1e-12
# So under it all but the last token can be drawn by any policy, the one that seeks the lowest r* too.
all_but_last = [
    policy.view(-1, world.vocabulary).sum(-1)
    for policy in (toy.guided(world, worst_case, BETA), toy.rlhf(world, -BETA))
]
assert (all_but_last[0] - all_but_last[1]).abs().max() < 1e-12
# 2. The partial-sequence loss puts the prefixes of a length in the order of their win rates.
for i in tokens:
    wins = toy.prefix_wins(world.wins, world.vocabulary, i)
    rate = wins.sum(-1) / (wins + wins.T).sum(-1)
    assert (rate[partial[i].argsort()].diff() > 0).all()
# 3. A guided step is the ratio of two RLHF policies, normalised over the next token.
for i in tokens:
    longer = toy.rlhf_at(world, partial, BETA, i).view(-1, world.vocabulary)
    ratio = longer / toy.rlhf_at(world, partial, BETA, i - 1).unsqueeze(-1)
    step = (world.conditionals[i - 1].log() + BETA * partial[i].view(longer.shape)).softmax(-1)
    assert (ratio / ratio.sum(-1, keepdim=True) - step).abs().max() < 1e-12
# 4. Guided by the soft value, the steps make up the RLHF policy itself.
assert (toy.guided(world, soft_value, BETA) - optimum).abs().max() < 1e-12

# %% [markdown]
# ## Is this one world?

# %%
WORLDS, DRAWS = 20, 10
found: dict[str, list[float]] = {}
for seed in range(WORLDS):
    other = toy.make_world(seed)
    zeros = [torch.zeros_like(table) for table in partial]
    for name, policies_of_world in {
        "full-sequence loss, prefixes mislead": [
            toy.guided(other, toy.full_bt(other, toy.realising(other, toy.rlhf(other, -BETA), BETA)), BETA)
        ],
        "full-sequence loss, prefixes noise": [
            toy.guided(other, toy.full_bt(other, toy.arbitrary(other, draw)), BETA) for draw in range(DRAWS)
        ],
        "full-sequence loss, prefixes 0": [toy.guided(other, toy.full_bt(other, zeros), BETA)],
        "partial-sequence loss": [toy.guided(other, toy.partial_bt(other), BETA)],
        "RLHF policy π e^{βr*}": [toy.rlhf(other, BETA)],
    }.items():
        found.setdefault(name, []).extend(float(policy @ other.reward) for policy in policies_of_world)
lines = [
    f"E[r*] in {WORLDS} worlds ({DRAWS} draws of the noise in each), β = {BETA:g}; the base model has 0 in all.",
    "",
    "| each token by | mean | lowest | highest | above the base model |",
    "|---|--:|--:|--:|--:|",
]
for name, rewards in found.items():
    above = sum(reward > 0 for reward in rewards)
    lines.append(
        f"| {name} | {np.mean(rewards):+.2f} | {min(rewards):+.2f} | {max(rewards):+.2f} | {above} of {len(rewards)} |"
    )
write_block(given.page, "\n".join(lines), "worlds")
print("\n".join(lines))

# %% [markdown]
# ## The decoder itself
# `RewardGuidedDecoder` samples answers with the three tables as its reward; their mean reward against the enumeration.

# %%
DRAWN = 4000
lines = [
    f"{DRAWN:,} answers drawn by `RewardGuidedDecoder`, `Guidance(k={world.vocabulary}, beta={BETA:g})`, against the "
    "enumerated policy.",
    "",
    "| reward | mean r*, drawn (± SE) | enumerated | χ² against the policy, p |",
    "|---|--:|--:|--:|",
]
for title, tables in models.items():
    seen = toy.draw(world, tables, BETA, DRAWN)
    policy = toy.guided(world, tables, BETA)
    rewards = world.reward[seen]
    error = float(rewards.std() / DRAWN**0.5)
    p = toy.chi_square(seen, policy)
    expected = float(policy @ world.reward)
    lines.append(f"| {title} | {float(rewards.mean()):+.3f} ± {error:.3f} | {expected:+.3f} | {p:.2f} |")
    assert p > 1e-4
write_block(given.page, "\n".join(lines), "decoder")
print("\n".join(lines))

# %% [markdown]
# ## Networks
# How transformers score prefixes that they were not trained on: two per world, of the same size, trained on the same
# 4,096 sampled pairs with this package's objectives. Their results are kept in networks.csv.

# %%
COLUMNS = ("world", "objective", "beta", "reward", "kl", *(f"right_on_{i}" for i in tokens))
NETWORK_WORLDS, NETWORK_BETAS = 8, (0.25, 0.5, 1.0, 2.0, 4.0)
if given.networks:
    NETWORKS.unlink(missing_ok=True)
    for seed in range(NETWORK_WORLDS):
        other = toy.make_world(seed)
        for objective in ("full_bt", "partial_bt"):
            tables = toy.train_network(other, objective, seed)
            shares = [f"{share:.4f}" for share in toy.accuracy(other, tables)]
            rows = []
            for beta in NETWORK_BETAS:
                policy = toy.guided(other, tables, beta)
                outcomes = (float(policy @ other.reward), toy.kl(policy, other.base))
                cells = (seed, objective, beta, *(f"{value:.4f}" for value in outcomes), *shares)
                rows.append(dict(zip(COLUMNS, cells, strict=True)))
            append(NETWORKS, rows, COLUMNS)
            print(seed, objective, *shares)
trained = read(NETWORKS)

# %%
OBJECTIVES = {"full_bt": ("full-sequence loss", RED), "partial_bt": ("partial-sequence loss", BLUE)}
figure = Figure(figsize=(9, 3.4), layout="constrained")
right, reached = figure.subplots(1, 2)
lines = [
    f"{NETWORK_WORLDS} worlds, one network of each kind in each; means, in brackets the lowest and the highest.",
    "",
    "| trained by | right on 1 token | 3 tokens | whole answers | E[r*], β = 1 | KL to π | E[r*], β = 4 | KL to π |",
    "|---|--:|--:|--:|--:|--:|--:|--:|",
]
for objective, (name, colour) in OBJECTIVES.items():
    own = [row for row in trained if row["objective"] == objective]
    curves_right, curves_reached = [], []
    for number in sorted({row["world"] for row in own}):
        of_world = [row for row in own if row["world"] == number]
        curves_right.append([float(of_world[0][f"right_on_{i}"]) for i in tokens])
        curves_reached.append([float(row["reward"]) for row in of_world])
    for axis, x, values in ((right, list(tokens), curves_right), (reached, NETWORK_BETAS, curves_reached)):
        axis.plot(x, np.array(values).T, color=colour, alpha=0.25, lw=0.8)
        axis.plot(x, np.mean(values, 0), "o-", ms=4, color=colour, label=name)
    cells = [np.array(curves_right)[:, i - 1] for i in (1, 3, 5)]
    for beta in ("1.0", "4.0"):
        cells += [np.array([float(r[c]) for r in own if r["beta"] == beta]) for c in ("reward", "kl")]
    shown = (f"{cell.mean():.2f} [{cell.min():.2f}, {cell.max():.2f}]" for cell in cells)
    lines.append(f"| {name} | {' | '.join(shown)} |")
right.set(xlabel="tokens of both answers that are read", ylabel="preferred answer scored higher")
right.set_xticks(list(tokens))
right.axhline(0.5, color=GREY, lw=0.8, ls=":")
reached.set(xscale="log", xlabel="β", ylabel="expected true reward E[r*]")
reached.set_xticks(NETWORK_BETAS, [f"{beta:g}" for beta in NETWORK_BETAS])
reached.minorticks_off()
reached.axhline(0, color=GREY, lw=0.8, ls=":")
for axis in (right, reached):
    axis.grid(alpha=0.3)
right.legend(fontsize=8)
save(figure, "networks.svg")
write_block(given.page, "\n".join(lines), "networks")
print("\n".join(lines))
