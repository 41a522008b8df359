"""Guides a decoding loop of your own: transformers' model and cache, RequestScorer's rewards.

    python examples/own_loop.py

The loop decodes two prompts of different lengths that begin and end at different times, as a server's requests do.
"""

import argparse
import inspect

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rgtg_fast import Guidance, RequestScorer
from rgtg_fast.bundled import default_model


class Request:
    """One prompt in the loop: its cache, its newest tokens and its answer."""

    def __init__(self, scorer: RequestScorer, prompt: list[int]):
        self.handle = scorer.add(prompt)
        self.cache, self.newest, self.answer = DynamicCache(), prompt, []


@torch.inference_mode()
def decode(
    model: torch.nn.Module,
    scorer: RequestScorer,
    prompts: list[list[int]],
    guidance: Guidance,
    new_tokens: int,
) -> list[list[int]]:
    """Greedy guided answers; prompt i arrives at step i."""
    waiting, active, answers = list(enumerate(prompts)), {}, {}
    # transformers 5.24 has renamed the argument.
    keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    while waiting or active:
        if waiting:
            index, prompt = waiting.pop(0)
            active[index] = Request(scorer, prompt)
        logits = []
        for request in active.values():
            # Your model, your cache: here one request at a time.
            out = model(torch.tensor([request.newest]), use_cache=True, **{keyword: request.cache})
            logits.append(out.logits[:, -1])
        handles = [request.handle for request in active.values()]
        tokens = scorer.guide(handles, torch.cat(logits), guidance).argmax(-1).tolist()
        for (index, request), token in zip(list(active.items()), tokens, strict=True):
            request.newest = [token]
            request.answer.append(token)
            scorer.advance(request.handle, request.answer)
            if token in scorer.eos_ids or len(request.answer) == new_tokens:
                answers[index] = request.answer
                scorer.drop(active.pop(index).handle)
    return [answers[index] for index in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", help="language model; by default the embedded one")
    parser.add_argument("--reward", default="contrastive", help="as in `rgtg-fast generate --reward`")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    options = parser.parse_args()
    lm = options.lm or str(default_model())
    tokenizer = AutoTokenizer.from_pretrained(lm)
    model = AutoModelForCausalLM.from_pretrained(lm).eval()
    scorer = RequestScorer.from_pretrained((model, tokenizer), options.reward, max_requests=2, max_length=512)
    texts = ["How can I sleep better?", "My neighbour is noisy. What should I do about it?"]
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        for chat in chats
    ]
    for text, answer in zip(
        texts, decode(model, scorer, prompts, Guidance(k=10, beta=1.0), options.max_new_tokens), strict=True
    ):
        print(f"{text}\n  {tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
