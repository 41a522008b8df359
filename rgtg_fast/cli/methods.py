"""The table of methods: what each one is called, where it comes from, what it computes and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rgtg_fast.cli import policies


@dataclass(frozen=True)
class Cost:
    """What one step of B rows with k candidates costs.

    Attributes:
        lm_calls: forwards of the base model. lm_rows, lm_candidates: tokens through it per row, and per candidate of a
            row.
        reward_calls: forwards of reward models. reward_rows, reward_candidates: tokens through them per row, and per
            candidate of a row.
        whole_texts: the tokens above are whole texts, encoded again at every step.
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
        """Calls and tokens of the base model, to be read."""
        return f"{self.lm_calls} × {f'{_times(self.lm_rows)}B' if self.lm_rows else 'B·k'}"

    def reward_words(self) -> str:
        """Calls and tokens of the reward models, to be read."""
        if not self.reward_calls:
            return "–"
        each = f"{_times(self.reward_rows // self.reward_calls)}B" if self.reward_rows else "B·k"
        return f"{self.reward_calls} × {each}{' texts' if self.whole_texts else ''}"

    def shared(self) -> Cost:
        """The cost where the guides are adapters that run in the base model's own forward.

        Their tokens ride along from the layer on where an adapter begins. A guide that scores candidates has them run
        instead of the newest token.
        """
        if self.reward_candidates:
            return replace(self, lm_rows=0, lm_candidates=1, reward_calls=0)
        return replace(self, reward_calls=0)

    def as_dict(self) -> dict[str, Any]:
        """Calls per step, and tokens per step in words and as numbers."""
        return {**asdict(self), "lm": self.lm_words(), "reward": self.reward_words()}


def _times(count: int) -> str:
    return "" if count == 1 else f"{count}·"


@dataclass(frozen=True)
class Method:
    """One method of the field.

    Attributes:
        name: what `--reward` and `named_guide` call it. title: in words.
        reward_class: the public class. usage: for `--reward`, None where only Python can give it.
        source: paper, empty where there is none. formula: g(v). support: values of `Guidance.support` that it serves.
        cost: of a step, None where it is the sum of others'. objective: of `rgtg-fast train`, None where it has none.
        published: the settings of the paper or its code.
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
        """Its page, from the root of the repository."""
        return f"docs/methods/{self.name}.md"

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
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
        "r(text of x, y_<i ∘ v), tokenised again",
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
        "Several guides with weights per request",
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
    """Another way to spend the same two models than token by token.

    Attributes:
        name: for `--strategy` and `generate(strategy=...)`. strategy_class: the public class. usage: with settings.
        source: paper, empty where there is none. rule: what it does.
        lm, reward: what an answer of n tokens costs, in tokens through each model. guides: which guides can serve.
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
        """Its page, from the root of the repository."""
        return f"docs/methods/{self.name.replace('_', '-')}.md"


STRATEGIES = (
    Strategy(
        "best_of_n",
        "BestOfN",
        "best_of_n:n=4,temperature=1",
        "",
        "n answers of the base model, the one with the highest reward of the whole answer is kept",
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
        "k blocks of samples, the best one is kept and all go on from there",
        "K·n",
        "K·n to (K + 1)·n, one forward a block",
        "SequenceReward, RADReward",
    ),
)


def report() -> dict[str, Any]:
    """The tables as data."""
    return {
        "methods": [method.as_dict() for method in METHODS],
        "strategies": [{**asdict(strategy), "page": strategy.page} for strategy in STRATEGIES],
        "policies": policies.report(),
    }


def markdown() -> str:
    """The table for docs/methods/README.md."""
    lines = [
        "| method | g(v) | support | LM | RM | `--reward` | class | trained by | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        cost = method.cost
        cells = (
            f"[{method.name}]({method.name}.md)",
            method.formula.replace("|", "\\|"),
            ", ".join(method.support),
            "sum" if cost is None else cost.lm_words(),
            "sum" if cost is None else cost.reward_words(),
            "–" if method.usage is None else f"`{method.usage}`",
            f"`{method.reward_class}`",
            "–" if method.objective is None else f"`{method.objective}`",
            method.source or "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def strategies_markdown() -> str:
    """The table of strategies for docs/methods/README.md."""
    lines = ["| strategy | what it does | LM tokens | RM tokens | guides | `--strategy` | class | source |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for each in STRATEGIES:
        page = each.page.rsplit("/")[-1]
        cells = (
            f"[{each.name}]({page})",
            each.rule,
            each.lm,
            each.reward,
            each.guides,
            f"`{each.usage}`",
            f"`{each.strategy_class}`",
            each.source or "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def show(console: Console) -> None:
    """Prints the tables."""
    table = Table(header_style="bold", box=box.SIMPLE, show_lines=True, padding=(0, 1, 0, 0))
    for column in ("method", "guidance g(v)", "LM", "RM", "--reward"):
        table.add_column(column, no_wrap=column in ("method", "LM", "RM"))
    for method in METHODS:
        cost = method.cost
        about = [method.source, f"support {', '.join(method.support)}"]
        about += [f"trained by {method.objective}"] if method.objective else []
        formula = Text(method.formula).append("\n" + "; ".join(part for part in about if part), "dim")
        table.add_row(
            Text(method.name, "bold"),
            formula,
            "sum" if cost is None else cost.lm_words(),
            "sum" if cost is None else cost.reward_words(),
            Text(method.usage or f"{method.reward_class} in Python"),
        )
    console.print(table)
    console.print(
        "LM, RM: forwards × tokens of one step, for B rows and k candidates. A mixture supports what all of its guides "
        "support.",
        style="dim",
    )
    table = Table(header_style="bold", box=box.SIMPLE, show_lines=True, padding=(0, 1, 0, 0))
    for column in ("strategy", "what it does", "LM tokens", "RM tokens", "--strategy"):
        table.add_column(column, no_wrap=column == "strategy")
    for strategy in STRATEGIES:
        about = f"{strategy.source}; " if strategy.source else ""
        rule = Text(strategy.rule).append(f"\n{about}guides: {strategy.guides}", "dim")
        table.add_row(Text(strategy.name, "bold"), rule, strategy.lm, strategy.reward, Text(strategy.usage))
    console.print(table)
    console.print(policies.table())
