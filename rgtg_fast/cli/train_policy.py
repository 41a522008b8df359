"""Runs `rgtg-fast train-policy` and tells what came out."""

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rgtg_fast.bundled import embedded
from rgtg_fast.cli.session import quiet
from rgtg_fast.cli.terminal import note, print_json, print_line, status


def run(
    model: str | None,
    data: str,
    output: Path,
    recipe: dict[str, Any],
    options: dict[str, Any],
    templates: Path | None = None,
    token_cache: Path | None = None,
    json: bool = False,
) -> None:
    """Trains a policy and tells what came out.

    Args:
        recipe: fields of `PolicyTrainConfig`.
        options: further arguments of `train_policy`.
        templates: file of T-REG's contrastive prompts.
        token_cache: folder for the reference's numbers, by default one beside the converted models.

    Raises:
        RGTGError: everything that a user can get wrong.
    """
    quiet()
    # What transformers, TRL and PEFT have deprecated of each other.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\..*")
    with status("Loading") as progress:
        from rgtg_fast.training.policy.config import PolicyTrainConfig
        from rgtg_fast.training.policy.launch import train_policy
        from rgtg_fast.training.t_reg import Templates

        chosen = PolicyTrainConfig(**recipe)
        texts = None if templates is None else Templates.load(templates)
        source = model if model is not None else str(embedded.default_model(progress))
    result = train_policy(
        source,
        data,
        output,
        chosen,
        templates=texts,
        token_cache=token_cache or embedded.cache_folder() / "tokens",
        progress=note,
        **options,
    )
    if json:
        print_json({**asdict(result), "output": str(output), "recipe": chosen.saved()})
        return
    if "accuracy" in result.metrics:
        print_line(
            f"held-out pairs whose chosen answer has the higher reward: {result.metrics['accuracy']:.3f}"
        )
    if "reward" in result.metrics:
        print_line(f"mean reward of the last answers: {result.metrics['reward']:.3f}")
    print_line(f"saved: {output}")
    print_line(f"try it: rgtg-fast generate --lm {output} --reward none 'How do I get better at chess?'")
