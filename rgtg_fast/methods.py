"""The tables of methods, strategies and policy objectives: name, source, formula and cost of each.

`rgtg-fast methods` and docs/methods/README.md show them, and tests compare the costs with what the decoder does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What one step of B rows with k candidates costs.

    Attributes:
        lm_calls: forwards of the base model.
        lm_rows: tokens through the base model per row.
        lm_candidates: tokens through the base model per candidate of a row.
        reward_calls: forwards of reward models.
        reward_rows: tokens through the reward models per row.
        reward_candidates: tokens through the reward models per candidate of a row.
        whole_texts: each of the reward models' tokens stands for a whole text, encoded again in every step.
    """

    lm_calls: int = 1
    lm_rows: int = 1
    lm_candidates: int = 0
    reward_calls: int = 1
    reward_rows: int = 0
    reward_candidates: int = 0
    whole_texts: bool = False

    def lm_tokens(self, rows: int, k: int) -> int:
        """Tokens through the base model in one step."""
        return rows * (self.lm_rows + k * self.lm_candidates)

    def reward_tokens(self, rows: int, k: int) -> int:
        """Tokens (texts, where they are whole) through the reward models in one step."""
        return rows * (self.reward_rows + k * self.reward_candidates)

    def lm_words(self) -> str:
        """Forwards and tokens of the base model as a formula."""
        return f"{self.lm_calls} × {f'{_times(self.lm_rows)}B' if self.lm_rows else 'B·k'}"

    def reward_words(self) -> str:
        """Forwards and tokens of the reward models as a formula."""
        if not self.reward_calls:
            return "–"
        each = f"{_times(self.reward_rows // self.reward_calls)}B" if self.reward_rows else "B·k"
        return f"{self.reward_calls} × {each}{' texts' if self.whole_texts else ''}"

    def shared(self) -> Cost:
        """The cost where the reward models are adapters that run in the base model's forward.

        Their tokens join the base model's from the adapters' first layer on. A reward that scores candidates replaces
        the newest token of each row by the candidates.
        """
        if self.reward_candidates:
            return replace(self, lm_rows=0, lm_candidates=1, reward_calls=0)
        return replace(self, reward_calls=0)

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, and both formulas."""
        return {**asdict(self), "lm": self.lm_words(), "reward": self.reward_words()}


def _times(count: int) -> str:
    return "" if count == 1 else f"{count}·"


@dataclass(frozen=True)
class Method:
    """One method of reward-guided decoding.

    Attributes:
        name: prefix of `--reward` and `named_guide`.
        title: name in words.
        reward_class: public class.
        usage: value of `--reward`, None where the method is available from Python alone.
        source: paper, empty if there is none.
        formula: guidance g(v) of token v.
        support: values of `Guidance.support` that the reward class can be used with.
        cost: of a step, None where it is the sum of others' costs.
        objective: of `rgtg-fast train`, None if there is none.
        published: settings of the paper or its code.
    """

    name: str
    title: str
    reward_class: str
    usage: str | None
    source: str
    formula: str
    support: tuple[str, ...]
    cost: Cost | None
    objective: str | None = None
    published: str | None = None

    @property
    def page(self) -> str:
        """Path of its page, from the root of the repository."""
        return f"docs/methods/{self.name}.md"

    def lm_words(self) -> str:
        """Forwards and tokens of the base model in a step as a formula."""
        return "sum" if self.cost is None else self.cost.lm_words()

    def reward_words(self) -> str:
        """Forwards and tokens of the reward models in a step as a formula."""
        return "sum" if self.cost is None else self.cost.reward_words()

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        cost = None if self.cost is None else self.cost.as_dict()
        return {**asdict(self), "support": list(self.support), "cost": cost, "page": self.page}


_LM, _WIDE = ("lm",), ("lm", "combined", "all")
_SCALAR = Cost(reward_candidates=1)

METHODS = (
    Method(
        "pargs",
        "Partial alignment as reward-guided sampling",
        "SequenceReward",
        "pargs:PATH",
        "arXiv 2406.07780",
        "r(x, y_<i ∘ v), r trained on partial sequences",
        _LM,
        _SCALAR,
        "partial_bt",
        "sampling, k=10, beta=2; PARGS-G: greedy, beta=1",
    ),
    Method(
        "args",
        "Alignment as reward-guided search",
        "SequenceReward",
        "args:PATH",
        "arXiv 2402.01694",
        "r(x, y_<i ∘ v), r trained on full sequences",
        _LM,
        _SCALAR,
        "full_bt",
        "greedy, k=10, beta=1",
    ),
    Method(
        "cd-fudge",
        "Controlled decoding, value by FUDGE regression",
        "SequenceReward",
        "cd-fudge:PATH",
        "arXiv 2310.17022",
        "V(x, y_<i ∘ v), V regressed onto the final reward",
        _LM,
        _SCALAR,
        "cd_fudge",
    ),
    Method(
        "rad",
        "Reward-augmented decoding",
        "RADReward",
        "rad:PATH, rad-inverse:PATH",
        "arXiv 2310.09520",
        "clamp(r(x, y_<i ∘ v), 0, 1), or 1 − that",
        _LM,
        _SCALAR,
        "rad",
        "sampling over the top k",
    ),
    Method(
        "farma",
        "Vocabulary-sized reward head",
        "VocabularyReward",
        "farma:PATH",
        "arXiv 2502.04517",
        "head(h(x, y_<i))[v]",
        _WIDE,
        Cost(reward_rows=1),
        "farma",
        "support=combined, k=10, beta=1; server: support=all, beta=1.8",
    ),
    Method(
        "genarm",
        "Autoregressive reward model",
        "AutoregressiveReward",
        "genarm:PATH",
        "arXiv 2410.08193",
        "log π_r(v | x, y_<i)",
        _WIDE,
        Cost(reward_rows=1),
        "genarm",
        "support=all",
    ),
    Method(
        "eft",
        "Emulated fine-tuning, proxy tuning",
        "LogRatioReward",
        "eft:TUNED,UNTUNED",
        "arXiv 2310.12962, arXiv 2401.08565",
        "log π_tuned(v | x, y_<i) − log π_untuned(v | x, y_<i)",
        _WIDE,
        Cost(reward_calls=2, reward_rows=2),
        None,
        "support=all, beta=1",
    ),
    Method(
        "contrastive",
        "Contrastive prompts",
        "ContrastiveReward",
        "contrastive",
        "token rewards of arXiv 2412.02685",
        "log π(v | x_better, y_<i) − log π(v | x_worse, y_<i)",
        _WIDE,
        Cost(lm_rows=3, reward_calls=0),
    ),
    Method(
        "text",
        "An encoder, or another tokenizer",
        "TextReward",
        "text:PATH",
        "",
        "r(text of x, y_<i ∘ v), tokenized again",
        _LM,
        Cost(reward_candidates=1, whole_texts=True),
    ),
    Method(
        "function",
        "Any Python function",
        "FunctionReward",
        None,
        "",
        "f(x ∘ y_<i, v)",
        _LM,
        _SCALAR,
    ),
    Method(
        "mixture",
        "Several rewards with weights per request",
        "MixtureReward",
        "mixture:W*GUIDE+W*GUIDE",
        "",
        "Σ_j w_j · g_j(v)",
        _WIDE,
        None,
    ),
)


@dataclass(frozen=True)
class Strategy:
    """A way of decoding other than choosing token by token.

    Attributes:
        name: for `--strategy` and `generate(strategy=...)`.
        strategy_class: public class.
        usage: value of `--strategy` with settings.
        source: paper, empty if there is none.
        rule: what it does.
        lm: tokens through the base model for an answer of n tokens.
        reward: tokens through the reward model for an answer of n tokens.
        guides: reward classes that it can be used with.
    """

    name: str
    strategy_class: str
    usage: str
    source: str
    rule: str
    lm: str
    reward: str
    guides: str

    @property
    def page(self) -> str:
        """Path of its page, from the root of the repository."""
        return f"docs/methods/{self.name.replace('_', '-')}.md"


STRATEGIES = (
    Strategy(
        "best_of_n",
        "BestOfN",
        "best_of_n:n=4,temperature=1",
        "",
        "N answers of the base model, the one with the highest reward of the whole answer is kept",
        "N·n",
        "N·(prompt + n), one forward an answer",
        "any",
    ),
    Strategy(
        "segment",
        "Segments",
        "segment:target=8.5,alpha=0.5,beta=0.7,entropy=3",
        "arXiv 2406.16306",
        "a segment of samples is accepted with probability min(1, exp((r − τ_t)/β)), else its caches are rolled back",
        "tokens drawn",
        "tokens drawn, one forward a segment",
        "SequenceReward, RADReward",
    ),
    Strategy(
        "blockwise",
        "Blocks",
        "blockwise:k=4,length=16",
        "arXiv 2310.17022",
        "K blocks of samples; the best one is kept and all continue from there",
        "K·n",
        "K·n to (K + 1)·n, one forward a block",
        "SequenceReward, RADReward",
    ),
)


@dataclass(frozen=True)
class Policy:
    """One way to train the language model itself.

    Attributes:
        name: value of `--objective`.
        title: name in words.
        page: path from the root of the repository.
        source: paper.
        formula: the loss.
        trainer: TRL's class that is used.
        data: what it learns from.
        cost: forwards of a training step; decoding costs one forward of the policy per token.
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


def report() -> dict[str, Any]:
    """The tables as data."""
    return {
        "methods": [method.as_dict() for method in METHODS],
        "strategies": [{**asdict(strategy), "page": strategy.page} for strategy in STRATEGIES],
        "policies": [asdict(policy) for policy in POLICIES],
    }


def methods_markdown() -> str:
    """The table of methods for docs/methods/README.md."""
    head = "method | g(v) | support | LM | RM | `--reward` | class | trained by | source"
    rows = (
        (
            f"[{method.name}]({method.name}.md)",
            method.formula.replace("|", "\\|"),
            ", ".join(method.support),
            method.lm_words(),
            method.reward_words(),
            "–" if method.usage is None else f"`{method.usage}`",
            f"`{method.reward_class}`",
            "–" if method.objective is None else f"`{method.objective}`",
            method.source or "–",
        )
        for method in METHODS
    )
    return _markdown(head, rows)


def strategies_markdown() -> str:
    """The table of strategies for docs/methods/README.md."""
    head = "strategy | what it does | LM tokens | RM tokens | rewards | `--strategy` | class | source"
    rows = (
        (
            f"[{each.name}]({each.page.rsplit('/')[-1]})",
            each.rule,
            each.lm,
            each.reward,
            each.guides,
            f"`{each.usage}`",
            f"`{each.strategy_class}`",
            each.source or "–",
        )
        for each in STRATEGIES
    )
    return _markdown(head, rows)


def policies_markdown() -> str:
    """The table of policy objectives for docs/methods/README.md."""
    head = "`--objective` | loss | TRL's | data | a step costs | source"
    rows = (
        (
            f"[{policy.name}]({policy.page.rsplit('/')[-1]})",
            policy.formula.replace("|", "\\|"),
            f"`{policy.trainer}`",
            policy.data,
            policy.cost,
            policy.source,
        )
        for policy in POLICIES
    )
    return _markdown(head, rows)


def _markdown(head: str, rows: Iterable[Sequence[str]]) -> str:
    ruler = "|".join("---" for _ in head.split(" | "))
    return "\n".join([f"| {head} |", f"|{ruler}|", *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"
