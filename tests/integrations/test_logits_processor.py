"""`RewardGuidedLogitsProcessor` in transformers' own loops: greedy, sampled and beams, against a naive one."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from rgtg_fast import (
    FunctionReward,
    Guidance,
    MixtureReward,
    RewardGuidedDecoder,
    RewardGuidedLogitsProcessor,
    RGTGError,
    SequenceReward,
    VocabularyReward,
)
from tests.conftest import make_lm, make_rm, make_tokenizer
from tests.rewards import naive

PROMPTS = [[7, 12, 30, 9], [41, 8], [10, 11, 12, 13, 14, 15, 16]]
MASK = torch.tensor([[int(i >= 7 - len(prompt)) for i in range(7)] for prompt in PROMPTS])
PADDED = torch.tensor([[0] * (7 - len(prompt)) + prompt for prompt in PROMPTS])
STEPS = 8


@pytest.fixture
def pair() -> Any:
    return make_lm(), make_tokenizer()


def sequence() -> Any:
    return SequenceReward((make_rm(), make_tokenizer()))


def farma() -> Any:
    return VocabularyReward((make_lm(3), make_tokenizer()))


def mixture() -> Any:
    return MixtureReward([sequence(), farma()])


def function() -> Any:
    def rewards(prefixes: list[torch.Tensor], candidates: torch.Tensor) -> torch.Tensor:
        sums = torch.stack([prefix.sum() for prefix in prefixes])
        return (candidates * sums[:, None] * 0.37).sin()

    return FunctionReward(rewards)


CASES: dict[str, tuple[Callable[[], Any], Guidance]] = {
    "sequence": (sequence, Guidance(5, 2.0)),
    "gated": (sequence, Guidance(5, 2.0, gate_entropy=2.0)),
    "combined": (farma, Guidance(4, 1.5, support="combined")),
    "all": (farma, Guidance(beta=0.7, support="all")),
    "mixture": (mixture, Guidance(4, 1.0, weights=(0.4, -0.6))),
    "function": (function, Guidance(4, 1.0)),
}


def guide_for(pair: Any, reward: Any, guidance: Guidance, rows: int = 8) -> RewardGuidedLogitsProcessor:
    return RewardGuidedLogitsProcessor.from_pretrained(pair, reward, guidance, max_rows=rows)


def greedy(pair: Any, reward: Any, guidance: Guidance) -> list[list[int]]:
    settings = {name: getattr(guidance, name) for name in ("k", "beta", "support", "weights", "gate_entropy")}
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), pair[1]), reward)
    return [row.tokens for row in decoder.generate(PROMPTS, STEPS, Guidance(temperature=0, **settings))]


def answers(out: torch.Tensor, length: int = 7) -> list[list[int]]:
    """The tokens before the first end token."""
    return [row[: row.index(1)] if 1 in row else row for row in out[:, length:].tolist()]


@pytest.mark.parametrize("name", CASES)
def test_a_padded_batch_gives_the_decoders_tokens(pair: Any, name: str) -> None:
    make, guidance = CASES[name]
    expected = greedy(pair, make(), guidance)
    guide = guide_for(pair, make(), guidance)
    settings = {"attention_mask": MASK, "max_new_tokens": STEPS, "do_sample": False}
    out = pair[0].generate(PADDED, logits_processor=[guide], **settings)
    assert answers(out) == expected
    assert answers(out) != answers(pair[0].generate(PADDED, **settings))
    # The next call begins anew, and its rows need not be as many.
    again = pair[0].generate(PADDED[1:2, 5:], logits_processor=[guide], max_new_tokens=STEPS, do_sample=False)
    assert answers(again, 2) == expected[1:2]
    assert answers(pair[0].generate(PADDED, logits_processor=[guide], **settings)) == expected


class Naive(LogitsProcessor):
    """log π + β·r on the k best tokens, from whole texts."""

    def __init__(self, formula: naive.Formula, k: int, beta: float, prompts: list[list[int]]):
        self.formula, self.k, self.beta, self.prompts = formula, k, beta, prompts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs, out = scores.log_softmax(-1), torch.full_like(scores, -torch.inf)
        each = len(scores) // len(self.prompts)
        for row, tokens in enumerate(logprobs.topk(self.k).indices.tolist()):
            answer = input_ids[row, 7:].tolist()
            for token in tokens:
                reward = self.formula(self.prompts[row // each], answer, token)
                out[row, token] = logprobs[row, token] + self.beta * reward
        return out


@pytest.mark.parametrize(("name", "sampled"), [("sequence", False), ("farma", True)])
def test_beams(pair: Any, name: str, sampled: bool) -> None:
    formula = naive.sequence(make_rm()) if name == "sequence" else naive.farma(make_lm(3))
    guide = guide_for(pair, sequence() if name == "sequence" else farma(), Guidance(6, 0.8), rows=9)
    settings = {
        "attention_mask": MASK, "max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2,
        "do_sample": sampled, "renormalize_logits": True,
    }  # fmt: skip
    outs = []
    for processor in (Naive(formula, 6, 0.8, PROMPTS), guide):
        torch.manual_seed(0)
        outs.append(pair[0].generate(PADDED, logits_processor=[processor], **settings))
    assert torch.equal(*outs)
    # Beams have left their places.
    torch.manual_seed(0)
    out = pair[0].generate(
        PADDED, logits_processor=[guide], **settings, return_dict_in_generate=True, output_scores=True
    )
    beams = out.beam_indices[out.beam_indices >= 0].tolist()
    assert any(beam % 3 for beam in beams)


def test_sampled_scores(pair: Any) -> None:
    guide = guide_for(pair, sequence(), Guidance(5, 2.0), rows=6)
    torch.manual_seed(1)
    out = pair[0].generate(
        PADDED, attention_mask=MASK, logits_processor=[guide], max_new_tokens=STEPS, do_sample=True, temperature=0.7,
        num_return_sequences=2, return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    expected = Naive(naive.sequence(make_rm()), 5, 2.0, PROMPTS)
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        own = expected(out.sequences[:, : 7 + step], logits) / 0.7
        assert torch.allclose(scores, own, atol=1e-4)
        assert (scores > -torch.inf).sum(1).tolist() == [5] * 6


def test_a_loop_of_ones_own(pair: Any) -> None:
    expected = greedy(pair, sequence(), Guidance(5, 2.0))
    guide = guide_for(pair, sequence(), Guidance(5, 2.0))
    ids, lm = torch.tensor([PROMPTS[2]]), pair[0]
    for _ in range(STEPS):
        with torch.no_grad():
            scores = guide(ids, lm(ids).logits[:, -1])
        scores[:, 2] = -torch.inf  # as later processors may
        token = scores.argmax(-1, keepdim=True)
        if int(token) == 1:
            break
        ids = torch.cat([ids, token], 1)
    assert ids[0, 7:].tolist() == expected[2]


def test_padding(pair: Any) -> None:
    guide = guide_for(pair, sequence(), Guidance(5, 2.0))
    expected = greedy(pair, sequence(), Guidance(5, 2.0))
    scores = torch.zeros(3, 64)
    right = torch.tensor([prompt + [0] * (7 - len(prompt)) for prompt in PROMPTS])
    with pytest.raises(RGTGError, match="row 0 ends with the padding token 0: pad on the left"):
        guide(right, scores)
    guide.begin(right != 0)
    with pytest.raises(RGTGError, match="leaves out tokens on the right or inside"):
        guide(right, scores)
    guide.begin(MASK[:, 1:])
    with pytest.raises(RGTGError, match="attention_mask is"):
        guide(PADDED, scores)
    # A model whose padding token begins prompts.
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<pad>"
    guide = guide_for((pair[0], tokenizer), sequence(), Guidance(5, 2.0))
    with pytest.raises(RGTGError, match="row 0 begins with token 0, which both pads and begins prompts"):
        guide(PADDED, scores)
    guide.begin(MASK)
    out = pair[0].generate(
        PADDED, attention_mask=MASK, logits_processor=[guide], max_new_tokens=STEPS, do_sample=False
    )
    assert answers(out) == expected


def test_what_cannot_be_served_is_refused_by_name(pair: Any) -> None:
    lm = pair[0]
    guide = guide_for(pair, sequence(), Guidance(5, 2.0), rows=2)
    with pytest.raises(RGTGError, match="temperature=0 belongs to generate"):
        guide_for(pair, sequence(), Guidance(temperature=0))
    with pytest.raises(RGTGError, match=r"3 rows \(prompts × beams or sequences\) and max_rows=2"):
        lm.generate(PADDED, attention_mask=MASK, logits_processor=[guide], max_new_tokens=4)
    embeds = lm.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
    with pytest.raises(RGTGError, match="inputs_embeds"):
        lm.generate(inputs_embeds=embeds, logits_processor=[guide], max_new_tokens=4)
    prompt = torch.tensor([PROMPTS[2]])
    with pytest.raises(RGTGError, match="do not continue"):
        lm.generate(
            prompt,
            assistant_model=make_lm(5),
            logits_processor=[guide],
            max_new_tokens=STEPS,
            do_sample=False,
        )
    # It works afterwards.
    out = lm.generate(prompt, logits_processor=[guide], max_new_tokens=STEPS, do_sample=False)
    assert answers(out) == greedy(pair, sequence(), Guidance(5, 2.0))[2:]
    long = torch.full((1, 130), 9)
    with pytest.raises(RGTGError, match="130 tokens for the base model"):
        guide(long, torch.zeros(1, 64))
    with pytest.raises(RGTGError, match="logits have shape"):
        guide(prompt, torch.zeros(1, 63))


def test_arguments_of_another_type(pair: Any) -> None:
    guide = guide_for(pair, sequence(), Guidance(5, 2.0))
    with pytest.raises(RGTGError, match=r"attention_mask=.* is not a tensor"):
        guide.begin([[1, 1]])  # pyright: ignore[reportArgumentType]
    with pytest.raises(RGTGError, match="scorer='x' is not a RequestScorer"):
        RewardGuidedLogitsProcessor("x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RGTGError, match=r"guidance=\{'k': 3\} is not a Guidance"):
        guide_for(pair, sequence(), {"k": 3})  # pyright: ignore[reportArgumentType]
    with pytest.raises(RGTGError, match="pad_token_id='x'"):
        RewardGuidedLogitsProcessor.from_pretrained(pair, sequence(), pad_token_id="x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RGTGError, match="LlamaForCausalLM alone: pass"):
        RewardGuidedLogitsProcessor.from_pretrained(pair[0], sequence())


@pytest.mark.slow
@pytest.mark.model
def test_the_bundled_reward(smollm2: Path) -> None:
    """With the embedded model, whose tokenizer pads with the token that ends answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    lm = AutoModelForCausalLM.from_pretrained(smollm2)
    chats = [[{"role": "user", "content": text}] for text in ("Hi!", "Why is the sky blue at noon?")]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    guide = guide_for((lm, tokenizer), "bundled:pargs", Guidance(4, 2.0), rows=2)
    out = lm.generate(**inputs, logits_processor=[guide], max_new_tokens=6, do_sample=False)
    decoder = RewardGuidedDecoder.from_pretrained(smollm2, "bundled:pargs")
    rows = decoder.generate(chats, 6, Guidance(4, 2.0, temperature=0))
    length = inputs["input_ids"].shape[1]
    assert [row[: len(mine.tokens)] for row, mine in zip(out[:, length:].tolist(), rows, strict=True)] == [
        row.tokens for row in rows
    ]
    assert all(row.tokens for row in rows)


@pytest.mark.slow
@pytest.mark.model
def test_the_example(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parents[2] / "examples" / "logits_processor.py"
    monkeypatch.setattr("sys.argv", [str(path), "--tokens", "4"])
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        way for way in ("unguided", "greedy", "sampled", "beams") for _ in range(2)
    ]
