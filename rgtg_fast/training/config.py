"""Settings of a training run. This module stays light, so that the command line can read them without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from rgtg_fast.config import DATA, OBJECTIVE, STEPS, TRAINED, option
from rgtg_fast.deprecation import renamed_keywords, warn_renamed
from rgtg_fast.errors import RGTGError

if TYPE_CHECKING:
    from rgtg_fast.training.losses import Objective

# "auto": by each answer's finish_reason; without one it counts as ended. "yes", "no": the same for all answers.
ANSWERS_ENDED = ("auto", "yes", "no")
ANSWERS_ENDED_HELP = (
    "Whether answers ended: auto (by the data's finish_reason; without one they did), or yes or no for all. An answer "
    "that was cut gets no end token and is read at its last text token."
)
# More epochs than any training runs; beyond it the number of steps overflows.
MAX_EPOCHS = 1_000_000
# Adapters of a higher rank than a layer is wide gain nothing.
MAX_RANK = 65536
# Old value of `mode` -> new one. Saved files have the old one.
RENAMED_MODES = {"hold": "repeat_last"}

_Config = TypeVar("_Config", bound="CommonConfig")


def check_answers_ended(value: str) -> None:
    """Checks a setting of whether answers ended.

    Raises:
        RGTGError: not one of `ANSWERS_ENDED`.
    """
    if value not in ANSWERS_ENDED:
        raise RGTGError(f"answers_ended={value!r} is unknown: use one of {', '.join(ANSWERS_ENDED)}")


def current_mode(mode: str, stacklevel: int) -> str:
    """The new name of a `mode`, with a warning where `mode` is the old one.

    Args:
        mode: old or new name of the mode.
        stacklevel: frames from the warning to the code that named the mode.
    """
    if mode in RENAMED_MODES:
        warn_renamed(f"mode={mode!r}", f"mode={RENAMED_MODES[mode]!r}", stacklevel)
    return RENAMED_MODES.get(mode, mode)


@dataclass(frozen=True)
class Lora:
    """Settings of low-rank adapters.

    Attributes:
        rank: rank of each update B·A.
        alpha: updates are scaled by alpha / rank.
        dropout: share of an adapter's inputs that are set to 0 in training.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RGTGError(f"LoRA rank {self.rank} is below 1: use for example 16, or train the full model")
        if self.rank > MAX_RANK:
            raise RGTGError(
                f"LoRA rank {self.rank} is above {MAX_RANK}, any layer's width: use for example 16"
            )
        if not 0 <= self.dropout < 1:
            raise RGTGError(f"LoRA dropout {self.dropout} is not in [0, 1): use for example 0.05")


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Settings that training a reward model and training a policy have in common.

    Attributes:
        objective: what is learned.
        fork_layer: layers below it are frozen; 0 trains all of them.
        full: train the weights themselves instead of LoRA adapters.
        lora_rank: rank of the adapters.
        lora_alpha: adapters are scaled by lora_alpha / lora_rank.
        lora_dropout: dropout before the adapters, in [0, 1).
        num_train_epochs: passes over the data.
        learning_rate: peak learning rate, after the warm-up; it decays to 0 along a cosine.
        warmup_ratio: share of the steps in which the learning rate rises, in [0, 1).
        weight_decay: weight decay of all parameters but biases and norms.
        gradient_accumulation_steps: batches of an optimizer step on one process.
        answers_ended: whether answers ended by themselves, one of `ANSWERS_ENDED`; see `load_pairs`.
        max_length: most tokens of a prompt with its longer answer.
        min_answer_tokens: pairs with a shorter answer are dropped.
        held_out: share of the pairs, split by prompt, to evaluate on where no evaluation data are given.
        limit: most pairs or prompts to use, from the beginning of the data; None for all.
        bf16: compute in bfloat16; trained weights stay float32.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        seed: seed of the order of the data, the initial adapters, dropout and samples.
    """

    objective: str = field(default="", kw_only=False)
    fork_layer: int = option("Train from this layer on.", 0, TRAINED)
    full: bool = option("Train the weights, not adapters.", False, TRAINED)
    lora_rank: int = option("Rank of the adapters.", 16, TRAINED)
    lora_alpha: float = option("Adapters are scaled by alpha / rank.", 32.0, TRAINED)
    lora_dropout: float = option("Dropout before the adapters.", 0.0, TRAINED)
    num_train_epochs: float = option("Passes over the data.", 1.0, STEPS, flags=("--epochs",))
    learning_rate: float = option("Learning rate.", 5e-5, STEPS, flags=("--lr",))
    warmup_ratio: float = 0.1
    weight_decay: float = option("Weight decay.", 0.0, STEPS)
    gradient_accumulation_steps: int = option(
        "Forwards of an optimizer step.", 4, STEPS, flags=("--accumulate",)
    )
    answers_ended: str = option(ANSWERS_ENDED_HELP, "auto", DATA)
    max_length: int = option("Tokens of a prompt and its longer answer.", 512, DATA)
    min_answer_tokens: int = option("Drop pairs with a shorter answer.", 0, DATA)
    held_out: float = option("Share of --data to evaluate on, by prompt.", 0.1, DATA)
    limit: int | None = option("Pairs to take at most.", None, DATA, shown="all")
    bf16: bool = option("Compute in bfloat16.", False, STEPS)
    gradient_checkpointing: bool = option(
        "Recompute activations in the backward pass: less memory, more time.", False, STEPS
    )
    seed: int = option("Seed of the order of the data, the initial adapters and dropout.", 0, STEPS)

    # Old field -> new one. Saved files have the old ones.
    RENAMED: ClassVar[dict[str, str]] = {
        "epochs": "num_train_epochs",
        "warmup": "warmup_ratio",
        "accumulation": "gradient_accumulation_steps",
    }

    @property
    def lora(self) -> Lora:
        """The adapters' settings."""
        return Lora(self.lora_rank, self.lora_alpha, self.lora_dropout)

    def updated(self: _Config, settings: Mapping[str, Any]) -> _Config:
        """A copy with other values of some fields.

        Raises:
            RGTGError: there is no such field, or a value is out of range.
        """
        names = [f.name for f in fields(self)]
        unknown = next((name for name in settings if name not in names), None)
        if unknown is not None:
            raise RGTGError(f"there is no setting {unknown!r}: use one of {', '.join(names)}")
        return replace(self, **settings)

    def saved(self) -> dict[str, Any]:
        """The settings under the names that `rgtg_fast.json` has for them."""
        old = {new: old for old, new in self.RENAMED.items()}
        return {old.get(name, name): value for name, value in asdict(self).items()}

    def _check(self, counts: Mapping[str, int], above: Sequence[str], least: Sequence[str]) -> None:
        """Checks the shared fields and the ranges of all.

        Args:
            counts: further whole numbers and the least value of each.
            above: further numbers above 0.
            least: further numbers from 0 up. A field that is None is not checked.

        Raises:
            RGTGError: naming the first field that is out of range.
        """
        check_answers_ended(self.answers_ended)
        _ = self.lora
        shared = {"gradient_accumulation_steps": 1, "max_length": 2, "min_answer_tokens": 0, "limit": 1}
        for name, smallest in {**counts, **shared}.items():
            value = getattr(self, name)
            if value is not None and not smallest <= value < 2**63:
                raise RGTGError(f"{name}={value} is not in {smallest} to 2^63 - 1: use at least {smallest}")
        for name in ("num_train_epochs", "learning_rate", "lora_alpha", *above):
            self._check_number(name, lambda value: 0 < value < math.inf, "above 0")
        for name in ("weight_decay", *least):
            self._check_number(name, lambda value: 0 <= value < math.inf, "a number from 0 up")
        if not 0 <= self.seed < 2**32:
            raise RGTGError(
                f"seed={self.seed} is not in 0 to 2^32 - 1, which numpy's generator takes: use another"
            )
        if self.num_train_epochs > MAX_EPOCHS:
            raise RGTGError(
                f"num_train_epochs={self.num_train_epochs} would never end: use at most {MAX_EPOCHS}"
            )
        for name in ("held_out", "warmup_ratio"):
            self._check_number(name, lambda value: 0 <= value < 1, "in [0, 1), a share")

    def _check_number(self, name: str, allowed: Any, word: str) -> None:
        value, default = getattr(self, name), getattr(type(self), name)
        if value is not None and not allowed(value):
            instead = "leave it out" if default is None else f"use for example {default}"
            raise RGTGError(f"{name}={value} is not {word}: {instead}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CommonConfig):
    """Settings that decide what a reward model learns: those of `CommonConfig`, and these.

    Attributes:
        objective, mode, weight, beta_r, stop_gradient: see `Objective`.
        judge: reward model (folder, hub id or `bundled:NAME`) whose rewards of the answers cd_fudge and rad regress
            onto, rad as σ(reward − mean). None for the data's own rewards.
        num_train_epochs: passes over the pairs; with farma, rounds of two passes.
        head_learning_rate: learning rate of the score head (farma: of the vocabulary head); None for the same.
        head_fit: fit the head (farma: its row of the end-of-sequence token) on the frozen model first, with a penalty
            of this strength (see `head_fit`); None starts from a head of zeros.
        token_budget: most tokens of a packed row.
        gradient_accumulation_steps: packed rows of an optimizer step on one process.
    """

    objective: str = option(
        "partial_bt (PARGS), full_bt (ARGS, judges), cd_fudge, rad, farma or genarm.",
        "partial_bt",
        OBJECTIVE,
        kw_only=False,
    )
    mode: str = option(
        "Past the shorter answer's end: repeat_last repeats its last reward, eos pads it with eos, truncate stops.",
        "repeat_last",
        OBJECTIVE,
    )
    weight: str = option("prefix: every prefix counts the same; pair: every pair does.", "prefix", OBJECTIVE)
    beta_r: float = option("genarm: scale of the log-probabilities.", 0.05, OBJECTIVE)
    stop_gradient: bool = option(
        "farma: the best next reward is a target without a gradient.", False, OBJECTIVE
    )
    judge: str | None = option(
        "cd_fudge, rad: reward model (path, hub id, bundled:NAME) whose rewards are learned.",
        None,
        OBJECTIVE,
        shown="the data's chosen_reward and rejected_reward, or 1 and 0",
    )
    fork_layer: int = option(
        "Train from this layer on; the layers below run once over the data and are cached.", 0, TRAINED
    )
    num_train_epochs: float = option("Passes over the pairs.", 1.0, STEPS, flags=("--epochs",))
    learning_rate: float = option("Learning rate.", 2e-4, STEPS, flags=("--lr",))
    head_learning_rate: float | None = option(
        "Learning rate of the trained head.", None, STEPS, flags=("--head-lr",), shown="--lr"
    )
    head_fit: float | None = option(
        "Fit the score head on the frozen model first, with a penalty of this strength, for example 0.3.",
        None,
        STEPS,
        shown="begin with zeros",
    )
    warmup_ratio: float = 0.05
    token_budget: int = option("Tokens of a packed row.", 2048, STEPS, flags=("--batch-tokens",))
    gradient_accumulation_steps: int = option("Rows of an optimizer step.", 4, STEPS, flags=("--accumulate",))

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", current_mode(self.mode, stacklevel=6))
        objective = self.objective_config
        if self.head_fit is not None:
            objective.check_head_fit(self.head_fit)
        if self.head_learning_rate is not None and self.objective == "genarm":
            raise RGTGError("genarm trains no head of its own: leave out head_learning_rate")
        if self.judge is not None and not objective.regression:
            raise RGTGError(f"{self.objective} compares answers and needs no rewards: leave out the judge")
        self._check({"token_budget": 2}, ("head_learning_rate",), ())

    @property
    def objective_config(self) -> Objective:
        """The objective with its settings."""
        from rgtg_fast.training.losses import Objective

        return Objective(self.objective, self.mode, self.weight, self.beta_r, self.stop_gradient)

    def saved(self) -> dict[str, Any]:
        """The settings under the names that `rgtg_fast.json` has for them."""
        modes = {new: old for old, new in RENAMED_MODES.items()}
        return super().saved() | {"mode": modes.get(self.mode, self.mode)}


TrainConfig.__init__ = renamed_keywords(**TrainConfig.RENAMED)(TrainConfig.__init__)
