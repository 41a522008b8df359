"""`rgtg-fast methods`: the tables of `rgtg_fast.methods` on the terminal."""

from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from rgtg_fast import methods
from rgtg_fast.cli.options import json_option
from rgtg_fast.cli.terminal import console, print_json


@dataclass(frozen=True, kw_only=True)
class Methods:
    """List the methods: formula, paper, cost of a token, and how `--reward` names them."""

    json: bool = json_option()

    def run(self) -> None:
        """Prints the tables."""
        if self.json:
            print_json(methods.report())
            return
        out = console()
        out.print(_methods())
        out.print(
            "LM, RM: forwards × tokens of one step, for B rows and k candidates. A mixture supports what all of its "
            "guides support.",
            style="dim",
        )
        out.print(_strategies())
        out.print(_policies())


def _table(columns: tuple[str, ...], unbroken: tuple[str, ...]) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE, show_lines=True, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column in unbroken)
    return table


def _methods() -> Table:
    table = _table(("method", "guidance g(v)", "LM", "RM", "--reward"), ("method", "LM", "RM"))
    for method in methods.METHODS:
        about = [method.source, f"support {', '.join(method.support)}"]
        about += [f"trained by {method.objective}"] if method.objective else []
        table.add_row(
            Text(method.name, "bold"),
            Text(method.formula).append("\n" + "; ".join(part for part in about if part), "dim"),
            method.lm_words(),
            method.reward_words(),
            Text(method.usage or f"{method.reward_class} in Python"),
        )
    return table


def _strategies() -> Table:
    table = _table(("strategy", "what it does", "LM tokens", "RM tokens", "--strategy"), ("strategy",))
    for strategy in methods.STRATEGIES:
        about = f"{strategy.source}; " if strategy.source else ""
        rule = Text(strategy.rule).append(f"\n{about}guides: {strategy.guides}", "dim")
        table.add_row(Text(strategy.name, "bold"), rule, strategy.lm, strategy.reward, Text(strategy.usage))
    return table


def _policies() -> Table:
    table = _table(("train-policy", "loss", "TRL's", "data"), ("train-policy",))
    for policy in methods.POLICIES:
        loss = Text(policy.formula).append(f"\n{policy.source}; {policy.title}", "dim")
        table.add_row(Text(policy.name, "bold"), loss, policy.trainer, policy.data)
    return table
