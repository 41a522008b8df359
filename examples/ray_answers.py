"""Ray Data: two actors answer a file of prompts; the answers are those of one decoder, however the rows are spread.

Run (needs ray[data]): python examples/ray_answers.py [lm] [reward]
"""

import json
import sys
from pathlib import Path

import ray

from rgtg_fast import Guidance
from rgtg_fast.bundled import default_model
from rgtg_fast.integrations.ray import RewardGuidedPredictor

settings = {
    "lm": sys.argv[1] if len(sys.argv) > 1 else str(default_model(print)),
    "reward": sys.argv[2] if len(sys.argv) > 2 else "bundled:pargs",
    "guidance": Guidance(k=10, beta=1.5, temperature=0.7),
    "max_new_tokens": 16,
    "seed_column": "seed",
}
lines = Path("examples/prompts.jsonl").read_text(encoding="utf-8").splitlines()
prompts = [json.loads(line)["prompt"] for line in lines]
rows = [{"prompt": prompt, "seed": number} for number, prompt in enumerate(prompts)]

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
answers = ray.data.from_items(rows, override_num_blocks=4).map_batches(
    RewardGuidedPredictor,
    fn_constructor_kwargs=settings,
    compute=ray.data.ActorPoolStrategy(size=2),
    batch_size=2,
)
for row in answers.take_all():
    print(f"{row['prompt']!r}: {row['error'] or row['answer']!r}")
