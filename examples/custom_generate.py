"""Guided decoding by transformers' own generate(): a padded batch, samples, a stop string and a stream.

Run: python examples/custom_generate.py [LANGUAGE_MODEL REWARD]
"""

import sys
from functools import partial

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StopStringCriteria, TextStreamer

from rgtg_fast import Guidance, custom_generate
from rgtg_fast.bundled import default_model

LM, REWARD = sys.argv[1:3] if len(sys.argv) > 2 else (default_model(print), "bundled:pargs")
PROMPTS = ["How do I learn to swim?", "Write one friendly sentence to a colleague who is leaving."]

tokenizer = AutoTokenizer.from_pretrained(LM, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(LM)
chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
inputs = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
)
# All that makes the call a guided one; the rest is transformers'.
guided = partial(
    model.generate, custom_generate=custom_generate, reward=REWARD, guidance=Guidance(k=10, beta=2.0)
)
width = inputs["input_ids"].shape[1]

print("Greedy:")
for row in guided(**inputs, max_new_tokens=32, do_sample=False):
    print("-", tokenizer.decode(row[width:], skip_special_tokens=True))

print("Three samples of each, up to the first full stop:")
torch.manual_seed(0)
stop = StopStringCriteria(tokenizer, ["."])
samples = guided(
    **inputs,
    max_new_tokens=32,
    do_sample=True,
    temperature=0.7,
    top_p=1.0,  # a model's generation config may ask for less, which guided decoding refuses
    num_return_sequences=3,
    stopping_criteria=[stop],
)
for row in samples:
    print("-", tokenizer.decode(row[width:], skip_special_tokens=True))

print("As a stream:")
first = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
guided(**first, max_new_tokens=32, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
