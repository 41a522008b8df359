"""The table of policy objectives: what `rgtg-fast train-policy` trains a language model on, and by what."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Policy:
    """One way to train the language model itself.

    Attributes:
        name: for `--objective`. title: in words. page: from the root of the repository.
        source: paper. formula: the loss. trainer: TRL's class beneath. data: what it learns from.
        cost: a training step's forwards, in answers' tokens; decoding costs one forward of the policy a token.
    """

    name: str
    title: str
    page: str
    source: str
    formula: str
    trainer: str
    data: str
    cost: str


POLICIES = (
    Policy(
        "dpo",
        "Direct preference optimisation",
        "docs/methods/dpo.md",
        "arXiv 2305.18290",
        "−log σ(r_θ(y^w) − r_θ(y^l)), r_θ = β log(π_θ/π_ref)",
        "DPOTrainer",
        "pairs",
        "policy 2 answers, forward and backward; reference 2, once",
    ),
    Policy(
        "simpo",
        "Length-normalised, without a reference",
        "docs/methods/dpo.md",
        "arXiv 2405.14734",
        "−log σ(r_θ(y^w) − r_θ(y^l) − γ), r_θ = (β/|y|) log π_θ",
        "DPOTrainer",
        "pairs",
        "policy 2 answers, forward and backward",
    ),
    Policy(
        "treg",
        "DPO with token rewards from contrastive prompts",
        "docs/methods/t-reg.md",
        "arXiv 2412.02685",
        "DPO − α w Σ_t β r̂(y_t) log π_θ(y_t), of both answers",
        "DPOTrainer",
        "pairs",
        "as dpo; reference 2 answers in 2 contexts each, once",
    ),
    Policy(
        "treg_simpo",
        "SimPO with token rewards",
        "docs/methods/t-reg.md",
        "arXiv 2412.02685",
        "SimPO − α w Σ_t (β/|y|) r̂(y_t) log π_θ(y_t), of both answers",
        "DPOTrainer",
        "pairs",
        "as simpo; reference 2 answers in 2 contexts each, once",
    ),
    Policy(
        "rloo",
        "Policy gradient, PPO's objective without a value model",
        "docs/methods/ppo.md",
        "arXiv 2402.14740",
        "−min(ρ A, clip(ρ) A), A_i = r_i − mean of the others",
        "RLOOTrainer",
        "prompts, a reward model",
        "samples; reward model and reference 1 each; policy forward and backward",
    ),
)


def report() -> list[dict[str, Any]]:
    """The table as data."""
    return [asdict(policy) for policy in POLICIES]


def markdown() -> str:
    """The table for docs/methods/README.md."""
    lines = ["| `--objective` | loss | TRL's | data | a step costs | source |", "|---|---|---|---|---|---|"]
    for policy in POLICIES:
        cells = (
            f"[{policy.name}]({policy.page.rsplit('/')[-1]})",
            policy.formula.replace("|", "\\|"),
            f"`{policy.trainer}`",
            policy.data,
            policy.cost,
            policy.source,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table() -> Table:
    """The table for the terminal."""
    shown = Table(header_style="bold", box=box.SIMPLE, show_lines=True, padding=(0, 1, 0, 0))
    for column in ("train-policy", "loss", "TRL's", "data"):
        shown.add_column(column, no_wrap=column == "train-policy")
    for policy in POLICIES:
        loss = Text(policy.formula).append(f"\n{policy.source}; {policy.title}", "dim")
        shown.add_row(Text(policy.name, "bold"), loss, policy.trainer, policy.data)
    return shown
