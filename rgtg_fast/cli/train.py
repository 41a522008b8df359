"""`rgtg-fast train`: trains a reward model on preference pairs and prints its accuracy."""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from rgtg_fast.bundled import embedded
from rgtg_fast.cli.options import include, json_option
from rgtg_fast.cli.session import PAIRS_HELP, Progress, Setup, quiet
from rgtg_fast.cli.terminal import console, note, print_json, print_line, status
from rgtg_fast.config import DATA, MODELS, OUTPUT, TRAINED, option
from rgtg_fast.training.config import CommonConfig, TrainConfig

# What `--reward` puts before the folder of a reward model; a folder alone is a `SequenceReward`.
_PREFIXES = {"rad": "rad:", "farma": "farma:", "genarm": "genarm:"}

Scores = list[tuple[list[float], list[float]]]


# The order of the configs' options in the help.
DATA_OPTIONS = "held_out limit max_length min_answer_tokens answers_ended"
TRAINED_OPTIONS = "fork_layer lora_rank lora_alpha lora_dropout full"
STEPS_OPTIONS = "gradient_accumulation_steps bf16 gradient_checkpointing seed"
_REWARD = f"""{DATA_OPTIONS} objective mode weight beta_r stop_gradient judge {TRAINED_OPTIONS}
    num_train_epochs learning_rate head_learning_rate head_fit weight_decay token_budget {STEPS_OPTIONS}"""


@dataclass(frozen=True, kw_only=True)
class TrainingCommand:
    """The options and arguments that both training commands have in common."""

    data: str = option(f"{PAIRS_HELP}.", panel=DATA)
    output: Path
    model: str | None
    eval_data: str | None = option("Pairs to evaluate on.", None, DATA, shown="--held-out of --data")
    config: CommonConfig
    setup: Setup = include("device")
    resume: bool = option("Go on from the last checkpoint in --output.", False, OUTPUT)
    save_steps: int = option("Steps between checkpoints.", 50, OUTPUT, min=1)
    logging_steps: int = option("Steps between lines of the log.", 10, OUTPUT, flags=("--log-steps",), min=1)
    report_to: list[str] | None = option(
        "Where transformers' Trainer reports: tensorboard, wandb, … (repeatable).", None, OUTPUT
    )
    merged: Path | None = option(
        "Also write a whole model with the adapters merged to this folder.",
        None,
        OUTPUT,
        flags=("--merge",),
    )
    json: bool = json_option()

    def source(self, progress: Progress) -> str:
        """The model to begin with; the embedded one by default."""
        return self.model if self.model is not None else str(embedded.default_model(progress))

    def arguments(self) -> dict[str, Any]:
        """The arguments that `train_reward_model` and `train_policy` have in common."""
        names = ("eval_data", "resume", "merged", "save_steps", "logging_steps")
        more = {"report_to": self.report_to or "none", "device": self.setup.device, "progress": note}
        return {name: getattr(self, name) for name in names} | more


@dataclass(frozen=True, kw_only=True)
class Train(TrainingCommand):
    """Train a reward model on preference pairs."""

    output: Path = option("New folder for the reward model.", panel=OUTPUT)
    model: str | None = option(
        "Language model to make the reward model from: path or hub id.",
        None,
        MODELS,
        shown="the embedded SmolLM2-135M-Instruct",
    )
    config: TrainConfig = include(_REWARD)
    trunk_cache: Path | None = option(
        "Folder for the activations below --fork-layer.", None, TRAINED, shown="in the user's cache folder"
    )
    no_trunk_cache: bool = option(
        "Run the layers below --fork-layer in every step, to save disk space.", False, TRAINED
    )
    fsdp: bool = option(
        "The processes that torchrun starts hold the weights together (FSDP2), for a model that is larger than a GPU.",
        False,
        TRAINED,
    )
    eval_steps: int | None = option(
        "Steps between evaluations.", None, OUTPUT, shown="at the end", min=1, before="logging_steps"
    )
    figure: Path | None = option(
        "Draw the held-out accuracy by prefix length (.png, .svg, .pdf).", None, OUTPUT, before="merged"
    )

    def run(self) -> None:
        """Trains the model and prints the result."""
        quiet()
        # transformers calls functions that it has deprecated itself.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
        with status("Loading") as progress:
            from rgtg_fast.evaluation.accuracy import check_figure
            from rgtg_fast.evaluation.accuracy import figure as draw
            from rgtg_fast.training.launch import train_reward_model

            config = self.config
            if self.figure is not None:
                check_figure(self.figure)
            source = self.source(progress)
        accuracy = PrefixAccuracy()
        result = train_reward_model(
            source,
            self.data,
            self.output,
            config,
            trunk_cache=self.trunk_cache or embedded.cache_folder() / "trunk",
            cache_trunk=not self.no_trunk_cache,
            eval_steps=self.eval_steps,
            fsdp=self.fsdp,
            metrics=accuracy,
            **self.arguments(),
        )
        points = accuracy.points
        if self.figure is not None and points:
            draw({config.objective: points}, self.figure, title=f"{self.output.name}, held-out pairs")
        if self.json:
            row = {**asdict(result), "filled": result.packing_efficiency, "output": str(self.output)}
            print_json({**row, "recipe": config.saved(), "accuracy": [point.as_dict() for point in points]})
            return
        if points:
            console().print(_table(points))
            print_line(_read_at(result.data["eval"]))
        print_line(f"saved: {self.output}")
        reward = f"{_PREFIXES.get(config.objective, '')}{self.output}"
        print_line(f"try it: rgtg-fast generate --reward {reward} 'How do I get better at chess?'")


class PrefixAccuracy:
    """Accuracy by the share of each answer that is read, as metrics for the log.

    Attributes:
        points: points of the last evaluation.
    """

    def __init__(self) -> None:
        self.points: list[Any] = []

    def __call__(self, scores: Scores) -> dict[str, float]:
        from rgtg_fast.evaluation.accuracy import prefix_accuracy

        self.points = prefix_accuracy(scores)
        return {f"accuracy_{point.fraction:g}": point.accuracy for point in self.points}


def _read_at(counts: dict[str, Any]) -> str:
    """At which token the held-out answers were read.

    Args:
        counts: counts of the evaluation data, as the result of a training has them.
    """
    from rgtg_fast.training.data import ends_text

    return ends_text(2 * counts["kept"] - counts["cut"], counts["cut"], counts["unstated"])


def _table(points: list[Any]) -> Table:
    table = Table(title=f"chosen preferred, {points[0].n} held-out pairs", title_justify="left")
    for name in ("answer read", "accuracy", "95 % interval"):
        table.add_column(name, justify="right")
    for point in points:
        low, high = point.ci95
        table.add_row(f"{point.fraction:.0%}", f"{point.accuracy:.3f}", f"{low:.3f} – {high:.3f}")
    return table
