"""TRL: GRPO whose answers come from the policy guided by a reward model (`rollout_func`, an experimental hook of TRL).

Run (needs trl): python examples/trl_rollout.py [lm] [reward] [steps]

Tried: TRL 1.16 with GRPOTrainer in one process on a CPU; the decoder follows the weights from step to step. Not tried:
several processes, a GPU, PEFT, vLLM. The answers are samples of the guided policy, not of the policy: TRL reads their
log-probabilities only where it corrects for vLLM's, so that its gradient takes them as the policy's own.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from rgtg_fast import Guidance, RewardGuidedDecoder
from rgtg_fast.bundled import default_model
from rgtg_fast.models.prompts import Prompt

GUIDANCE = Guidance(k=10, beta=1.0, temperature=1.0)


class GuidedRollouts:
    """Answers to a step's prompts, one for each: TRL repeats a prompt for every answer of its group.

    Args:
        reward: path of the reward model.
    """

    def __init__(self, reward: str):
        self.reward, self.decoder, self.seed = reward, None, 0

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        policy, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
        training = policy.training
        policy.eval()
        if self.decoder is None:
            # It reads the policy's weights where they are: a step of the optimizer changes them in place.
            self.decoder = RewardGuidedDecoder.from_pretrained((policy, tokenizer), reward=self.reward)
        seeds = range(self.seed, self.seed + len(prompts))
        self.seed += len(prompts)
        with torch.no_grad():
            rows = self.decoder.generate(
                prompts,
                max_new_tokens=trainer.args.max_completion_length,
                guidance=GUIDANCE,
                seed=list(seeds),
                trace=True,
            )
        policy.train(training)
        ends = [[] if row.end_token is None else [row.end_token] for row in rows]
        chosen = [[next(c for c in step.candidates if c.chosen) for step in row.trace or []] for row in rows]
        return {
            "prompt_ids": [Prompt(prompt).ids(tokenizer) for prompt in prompts],
            "completion_ids": [row.tokens + end for row, end in zip(rows, ends, strict=True)],
            "logprobs": [[math.log(candidate.probability) for candidate in row] for row in chosen],
        }


def distinct_words(completions: list[Any], **_: Any) -> list[float]:
    """What GRPO maximizes here: the share of an answer's words that occur in it once."""
    texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
    return [len(set(text.split())) / max(len(text.split()), 1) for text in texts]


def main(lm: str, reward: str, steps: int, output: str) -> None:
    """Trains for some steps, and prints each step's loss and mean reward."""
    lines = Path("examples/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    settings = GRPOConfig(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=12,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        # Under autocast, or with the hooks of checkpointing, a module is not what the decoder was made for.
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = GRPOTrainer(
        model=lm,
        args=settings,
        reward_funcs=distinct_words,
        train_dataset=Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in lines]),
        rollout_func=GuidedRollouts(reward),
    )
    trainer.train()
    for log in trainer.state.log_history[:-1]:
        print(f"step {log['step']}: loss {log['loss']:.4f}, reward {log['reward']:.3f}")


if __name__ == "__main__":
    given = sys.argv[1:] + [""] * 3
    with tempfile.TemporaryDirectory() as folder:
        main(given[0] or str(default_model(print)), given[1] or "bundled:pargs", int(given[2] or 3), folder)
