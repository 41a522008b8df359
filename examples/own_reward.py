"""A Python function as the reward: answers without the letter e, streamed.

Run: python examples/own_reward.py
"""

import torch

from rgtg_fast import Guidance, RewardGuidedDecoder
from rgtg_fast.bundled.embedded import default_model


def main() -> None:
    decoder = RewardGuidedDecoder.from_pretrained(default_model(print), reward=lambda *ids: penalty[ids[1]])
    tokenizer = decoder.tokenizer
    assert tokenizer is not None
    texts = tokenizer.batch_decode([[token] for token in range(decoder.lm.vocabulary)])
    penalty = torch.tensor([-float("e" in text.lower()) for text in texts])
    chat = [{"role": "user", "content": "Describe a forest at dawn."}]
    # Among 50 candidates there is nearly always one without an e; beta decides how much it may cost.
    for piece in decoder.stream(chat, max_new_tokens=40, guidance=Guidance(k=50, beta=20.0, temperature=0.7)):
        print(piece.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
