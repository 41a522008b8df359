"""lm-evaluation-harness with a guided model: a local task with the base model alone, then guided by two weights.

Run (needs lm-eval): python examples/lm_eval_guided.py [lm] [reward]
"""

import sys

import lm_eval
from lm_eval.tasks import TaskManager

from rgtg_fast.bundled import default_model
from rgtg_fast.integrations.lm_eval import RewardGuidedLM

LM = sys.argv[1] if len(sys.argv) > 1 else str(default_model(print))
REWARD = sys.argv[2] if len(sys.argv) > 2 else "contrastive"

tasks = TaskManager(include_path="examples/lm_eval")
for beta in (0.0, 0.5, 1.0):
    model = RewardGuidedLM(lm=LM, reward=REWARD, beta=beta)
    results = lm_eval.simple_evaluate(model=model, tasks=["capitals"], task_manager=tasks)
    answers = [sample["filtered_resps"][0] for sample in results["samples"]["capitals"]]
    print(f"beta={beta}: exact match {results['results']['capitals']['exact_match,city']:.2f}, {answers}")
