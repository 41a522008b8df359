"""Settings of training a policy. This module stays light, so that the command line can read them without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rgtg_fast.config import DATA, OBJECTIVE, STEPS, option
from rgtg_fast.deprecation import renamed_keywords
from rgtg_fast.errors import RGTGError
from rgtg_fast.training.config import CommonConfig

# Pairs of a forward; transformers counts through all of a batch, whether they are there or not.
MAX_BATCH = 2**20


@dataclass(frozen=True)
class PolicyObjective:
    """What distinguishes an objective.

    Attributes:
        beta: default of β.
        form: "dpo" or "simpo", None for policy gradients.
        token_rewards: whether it has T-REG's token rewards.
    """

    beta: float
    form: str | None
    token_rewards: bool = False


POLICY_OBJECTIVES = {
    "dpo": PolicyObjective(0.1, "dpo"),
    "simpo": PolicyObjective(2.0, "simpo"),
    "treg": PolicyObjective(0.1, "dpo", token_rewards=True),
    "treg_simpo": PolicyObjective(2.0, "simpo", token_rewards=True),
    "rloo": PolicyObjective(0.05, None),
}


@dataclass(frozen=True, kw_only=True)
class PolicyTrainConfig(CommonConfig):
    """Settings that decide what a policy learns: those of `CommonConfig`, and these.

    Attributes:
        objective: one of `POLICY_OBJECTIVES`.
        beta: β of the preference loss, for rloo the weight of the KL divergence to the reference; None for 0.1 (dpo,
            treg), 2 (simpo, treg_simpo) or 0.05 (rloo).
        margin: γ of simpo and treg_simpo.
        alpha: α, the weight of T-REG's regularizer.
        per_device_train_batch_size: pairs (rloo: answers) of a forward.
        gradient_accumulation_steps: forwards of an optimizer step on one process.
        answers_ended: as in `CommonConfig`; answers that were cut have no end token to learn. Not for rloo.
        num_generations: answers to each prompt that rloo compares.
        max_completion_length: most tokens of these answers.
        temperature: of these answers.
        num_iterations: optimizer steps on the same answers, with PPO's clipped ratio (rloo).
    """

    objective: str = option("dpo, simpo, treg, treg_simpo or rloo.", "dpo", OBJECTIVE, kw_only=False)
    beta: float | None = option(
        "Weight of the preference loss; for rloo of the KL divergence.",
        None,
        OBJECTIVE,
        shown="0.1; simpo 2; rloo 0.05",
    )
    margin: float = option("SimPO's margin.", 1.0, OBJECTIVE)
    alpha: float = option("Weight of T-REG's regularizer.", 0.25, OBJECTIVE)
    num_generations: int = option("Answers to a prompt (rloo).", 4, OBJECTIVE, flags=("--samples",))
    max_completion_length: int = option(
        "Tokens of an answer (rloo).", 64, OBJECTIVE, flags=("--max-new-tokens",)
    )
    temperature: float = option("Temperature of the answers (rloo).", 1.0, OBJECTIVE)
    num_iterations: int = option(
        "Steps on the same answers, with PPO's clipped ratio (rloo).", 1, OBJECTIVE, flags=("--iterations",)
    )
    per_device_train_batch_size: int = option(
        "Pairs (rloo: answers) of a forward.", 4, STEPS, flags=("--batch",)
    )
    limit: int | None = option("Pairs or prompts to take at most.", None, DATA, shown="all")

    RENAMED: ClassVar[dict[str, str]] = CommonConfig.RENAMED | {
        "batch_size": "per_device_train_batch_size",
        "samples": "num_generations",
        "max_new_tokens": "max_completion_length",
        "iterations": "num_iterations",
    }

    def __post_init__(self) -> None:
        if self.objective == "ppo":
            raise RGTGError(
                "objective='ppo': TRL has no PPO trainer since version 1.13; use 'rloo', PPO's clipped ratio with the "
                "other answers' mean reward in the place of a value model"
            )
        if self.objective not in POLICY_OBJECTIVES:
            raise RGTGError(
                f"objective={self.objective!r} is unknown: use one of {', '.join(POLICY_OBJECTIVES)}"
            )
        counts = ("per_device_train_batch_size", "max_completion_length", "num_iterations", "num_generations")
        self._check(dict.fromkeys(counts, 1), ("temperature",), ("beta", "alpha", "margin"))
        batch, samples = self.per_device_train_batch_size, self.num_generations
        if batch > MAX_BATCH:
            raise RGTGError(
                f"per_device_train_batch_size={batch} is above {MAX_BATCH}: use gradient_accumulation_steps for more"
            )
        if self.beta == 0 and self.objective != "rloo":
            raise RGTGError(f"beta=0 leaves {self.objective} no preference to learn: use for example 0.1")
        if self.objective == "rloo" and samples < 2:
            raise RGTGError(f"num_generations={samples} leaves rloo nothing to compare with: use at least 2")
        if self.objective == "rloo" and batch * self.gradient_accumulation_steps % samples:
            raise RGTGError(
                f"per_device_train_batch_size={batch} times "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} is not a multiple of "
                f"num_generations={samples}: the answers to a prompt belong into one step"
            )

    @property
    def kind(self) -> PolicyObjective:
        """What distinguishes the objective."""
        return POLICY_OBJECTIVES[self.objective]

    @property
    def loss_beta(self) -> float:
        """β, the objective's default where none is set."""
        return self.kind.beta if self.beta is None else self.beta


PolicyTrainConfig.__init__ = renamed_keywords(**PolicyTrainConfig.RENAMED)(PolicyTrainConfig.__init__)
