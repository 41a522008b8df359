"""Guides with a reward model, row by row as answers finish, with a weight of its own for each prompt.

Run: python examples/reward_model.py LM RM    (paths or hub ids; the reward model over the same tokenizer, one label)
"""

import sys

from rgtg_fast import Guidance, RewardGuidedDecoder

if len(sys.argv) != 3:
    sys.exit(__doc__)
decoder = RewardGuidedDecoder.from_pretrained(sys.argv[1], reward=sys.argv[2], max_batch=4)
# A chat goes through the language model's own template; for a model without one, pass a plain string.
prompt = [{"role": "user", "content": "How can I make friends in a new city?"}]
weights = [0.0, 0.5, 1.0, 2.0, 4.0]
settings = [Guidance(k=10, beta=beta, temperature=0) for beta in weights]
for index, row in decoder.iterate([prompt] * len(weights), max_new_tokens=48, guidance=settings):
    print(f"beta={weights[index]}: reward {row.reward:+.3f}, log p {sum(row.logprobs):.1f}: {row.text!r}")
