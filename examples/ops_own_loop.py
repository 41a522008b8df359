"""Two of the ops in a loop of your own over a transformers model: candidates, your rewards, and a draw by seed.

Run: python examples/ops_own_loop.py [--compile]
"""

import argparse
import inspect

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from rgtg_fast.bundled import default_model
from rgtg_fast.ops import resample, topk_logprobs


def choose(
    logits: torch.Tensor,
    penalty: torch.Tensor,
    beta: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """The next tokens [B] for logits [B, V] and a reward for every token, penalty [V]."""
    logprobs, tokens, _ = topk_logprobs(logits, k=50)
    choice, _ = resample(logprobs, penalty[tokens], beta, temperature, seed, position)
    return tokens.gather(1, choice[:, None]).squeeze(1)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    penalty: torch.Tensor,
    beta: float,
    temperature: float,
    steps: int,
    compiled: bool = False,
) -> torch.Tensor:
    """Answers [B, steps] to prompts [B, T] of one length; row b draws with seed b."""
    pick = torch.compile(choose, fullgraph=True) if compiled else choose
    rows = torch.arange(len(prompts))
    settings = torch.full((len(prompts),), beta), torch.full((len(prompts),), temperature), rows
    # Its name before transformers 5.24 is the second.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    kept: dict = {name: DynamicCache(config=model.config), "use_cache": True}
    tokens, answers = prompts, []
    for step in range(steps):
        logits = model(tokens, **kept).logits[:, -1].float()
        answers.append(pick(logits, penalty, *settings, torch.full_like(rows, step)))
        tokens = answers[-1][:, None]
    return torch.stack(answers, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile(fullgraph=True); needs a C++ compiler"
    )
    folder = default_model(print)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Describe a forest at dawn."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    texts = tokenizer.batch_decode([[token] for token in range(model.config.vocab_size)])
    penalty = torch.tensor([-float("e" in text.lower()) for text in texts])
    prompts = torch.tensor([prompt, prompt])
    compiled = parser.parse_args().compile
    for answer in generate(model, prompts, penalty, 20.0, 0.7, 40, compiled):
        print("-", tokenizer.decode(answer, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
