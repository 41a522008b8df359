"""Guides a generation loop of transformers: greedy, sampled and with beams.

    python examples/logits_processor.py

The model is SmolLM2-135M-Instruct, which is embedded in a package, and the reward model comes with rgtg-fast.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from rgtg_fast import Guidance, RewardGuidedLogitsProcessor
from rgtg_fast.bundled import default_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=24, help="tokens of an answer at most")
    tokens = parser.parse_args().tokens

    folder = default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    guide = RewardGuidedLogitsProcessor.from_pretrained(
        (model, tokenizer), "bundled:pargs", Guidance(k=10, beta=6.0), max_rows=6
    )

    questions = "What is a good name for a cat?", "Why does bread rise?"
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    ways = {
        "unguided": {"do_sample": False},
        "greedy": {"logits_processor": [guide], "do_sample": False},
        "sampled": {"logits_processor": [guide], "do_sample": True, "temperature": 0.7},
        "beams": {
            "logits_processor": [guide],
            "do_sample": False,
            "num_beams": 3,
            "renormalize_logits": True,
        },
    }
    for way, settings in ways.items():
        output = model.generate(**inputs, **settings, max_new_tokens=tokens)
        answers = output[:, inputs["input_ids"].shape[1] :]
        for question, answer in zip(
            questions, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True
        ):
            print(f"{way:9} {question}  {answer.strip()!r}")


if __name__ == "__main__":
    main()
