"""`rgtg-fast train-policy`: trains a language model on preferences and prints its metrics."""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from rgtg_fast.bundled import embedded
from rgtg_fast.cli.options import include
from rgtg_fast.cli.session import PAIRS_HELP, quiet
from rgtg_fast.cli.terminal import print_json, print_line, status
from rgtg_fast.cli.train import DATA_OPTIONS, STEPS_OPTIONS, TRAINED_OPTIONS, TrainingCommand
from rgtg_fast.config import DATA, MODELS, OBJECTIVE, OUTPUT, option
from rgtg_fast.training.policy.config import PolicyTrainConfig

# The order of the config's options in the help.
_POLICY = f"""{DATA_OPTIONS} objective beta margin alpha num_generations max_completion_length temperature
    num_iterations {TRAINED_OPTIONS}
    num_train_epochs learning_rate weight_decay per_device_train_batch_size {STEPS_OPTIONS}"""


@dataclass(frozen=True, kw_only=True)
class TrainPolicy(TrainingCommand):
    """Train the language model itself on preferences: DPO, SimPO, T-REG or RLOO, by TRL."""

    data: str = option(f"{PAIRS_HELP}; for rloo rows with a prompt.", panel=DATA)
    output: Path = option("New folder for the policy.", panel=OUTPUT)
    model: str | None = option(
        "Language model to begin with, which is the reference: path or hub id.",
        None,
        MODELS,
        shown="the embedded SmolLM2-135M-Instruct",
    )
    config: PolicyTrainConfig = include(_POLICY)
    reward: str | None = option(
        "What rloo maximizes: path or hub id of a reward model or adapter, or `bundled:NAME`.",
        None,
        MODELS,
        before="device",
    )
    templates: Path | None = option(
        "YAML file with T-REG's contrastive prompts.",
        None,
        OBJECTIVE,
        shown="the project's own",
        before="num_generations",
    )
    token_cache: Path | None = option(
        "Folder for the reference's log-probabilities and token rewards, computed once.",
        None,
        OBJECTIVE,
        shown="in the user's cache folder",
        before="num_generations",
    )

    def run(self) -> None:
        """Trains the policy and prints the result."""
        quiet()
        # transformers, TRL and PEFT call deprecated functions of each other.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\..*")
        with status("Loading") as progress:
            from rgtg_fast.training.policy.launch import train_policy
            from rgtg_fast.training.t_reg import Templates

            templates = None if self.templates is None else Templates.load(self.templates)
            source = self.source(progress)
        result = train_policy(
            source,
            self.data,
            self.output,
            self.config,
            reward=self.reward,
            templates=templates,
            token_cache=self.token_cache or embedded.cache_folder() / "tokens",
            **self.arguments(),
        )
        if self.json:
            print_json({**asdict(result), "output": str(self.output), "recipe": self.config.saved()})
            return
        metrics = result.metrics
        if "accuracy" in metrics:
            accuracy = f"{metrics['accuracy']:.3f}"
            print_line(f"held-out pairs whose chosen answer has the higher reward: {accuracy}")
        if "reward" in metrics:
            print_line(f"mean reward of the last answers: {metrics['reward']:.3f}")
        print_line(f"saved: {self.output}")
        print_line(
            f"try it: rgtg-fast generate --lm {self.output} --reward none 'How do I get better at chess?'"
        )
