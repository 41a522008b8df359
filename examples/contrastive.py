"""Contrastive prompts: answers the same question with two pairs of system prompts, two samples each.

Run: python examples/contrastive.py [question]
"""

import sys

from rgtg_fast import ContrastiveReward, Guidance, RewardGuidedDecoder
from rgtg_fast.bundled import default_model

QUESTION = sys.argv[1] if len(sys.argv) > 1 else "What should I cook tonight?"
PAIRS = {
    "friendly": ("You are warm and encouraging.", "You are cold and dismissive."),
    "practical": ("You give short, concrete steps.", "You philosophise without end."),
}

model = default_model(print)
chat = [{"role": "user", "content": QUESTION}]
guidance = Guidance(k=10, beta=1.5, temperature=0.7)
for name, (better, worse) in PAIRS.items():
    decoder = RewardGuidedDecoder.from_pretrained(model, reward=ContrastiveReward(better, worse))
    # Several seeds give several answers to the same prompt.
    result = decoder.generate([chat] * 2, max_new_tokens=40, guidance=guidance, seed=[1, 2])
    for row in result:
        print(f"\n{name}, log-ratio {row.reward:+.2f}: {row.text}")
    print(f"({result.stats.tokens_per_second:.1f} tokens/s)")
