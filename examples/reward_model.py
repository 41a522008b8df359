"""A reward model with several weights in one batch; rows are printed as they finish.

Run: python examples/reward_model.py LM RM

LM and RM are paths or hub ids; the reward model has one label and the language model's tokenizer.
"""

import sys

from rgtg_fast import Guidance, RewardGuidedDecoder

if len(sys.argv) != 3:
    sys.exit(__doc__)
decoder = RewardGuidedDecoder.from_pretrained(sys.argv[1], reward=sys.argv[2], max_batch=4)
# The language model's chat template formats the chat; for a model without one, pass a plain string.
prompt = [{"role": "user", "content": "How can I make friends in a new city?"}]
weights = [0.0, 0.5, 1.0, 2.0, 4.0]
settings = [Guidance(k=10, beta=beta, temperature=0) for beta in weights]
for index, row in decoder.iterate([prompt] * len(weights), max_new_tokens=48, guidance=settings):
    print(f"beta={weights[index]}: reward {row.reward:+.3f}, log p {sum(row.logprobs):.1f}: {row.text!r}")
