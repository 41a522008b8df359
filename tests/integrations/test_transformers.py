"""`model.generate(custom_generate=rgtg_fast.custom_generate)` against `RewardGuidedDecoder.generate`."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, TextIteratorStreamer
from transformers.generation import (
    LogitsProcessor,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError, SequenceReward, custom_generate
from tests.conftest import make_lm, make_rm, make_tokenizer

PROMPTS = [[5, 9, 12], [7, 8, 30, 41, 22], [6]]
GUIDED = Guidance(k=8, beta=2.0)
NEW = 16
# transformers 5.19 calls it past_key_values, 5.24 cache.
INPUTS = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in INPUTS else "past_key_values"


def padded(prompts: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """Prompts as a padded batch with its mask; the padding token is one that a prompt may hold too."""
    width = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        fill = width - len(prompt)
        before, behind = (fill, 0) if side == "left" else (0, fill)
        rows.append([0] * before + prompt + [0] * behind)
        masks.append([0] * before + [1] * len(prompt) + [0] * behind)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def expected(
    prompts: list[list[int]], guidance: Guidance, seed: Any = 0, new: int = NEW, **models: Any
) -> list[list[int]]:
    """The answers of a decoder with models of its own, end-of-sequence tokens included."""
    pair = models.get("lm", make_lm()), make_tokenizer()
    decoder = RewardGuidedDecoder.from_pretrained(pair, models.get("reward", (make_rm(), pair[1])))
    rows = decoder.generate(prompts, max_new_tokens=new, guidance=guidance, seed=seed)
    return [row.tokens + ([] if row.end_token is None else [row.end_token]) for row in rows]


def answers(sequences: torch.Tensor, width: int, pad: int = 0) -> list[list[int]]:
    """The answers in generate()'s sequences, without what pads them at the end."""
    found = []
    for row in sequences[:, width:].tolist():
        end = row.index(1) + 1 if 1 in row else len(row)
        assert set(row[end:]) <= {pad}
        found.append(row[:end])
    return found


@pytest.fixture
def reward() -> SequenceReward:
    return SequenceReward((make_rm(), make_tokenizer()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_equal_the_decoders(
    lm: torch.nn.Module, reward: SequenceReward, side: str, temperature: float
) -> None:
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    batch = padded(PROMPTS, side)
    sequences = lm.generate(
        **batch,
        custom_generate=custom_generate,
        reward=reward,
        guidance=GUIDED,
        seed=3,
        max_new_tokens=NEW,
        **sampling,
    )
    assert torch.equal(sequences[:, :5], batch["input_ids"])
    assert sequences.dtype == torch.int64
    want = expected(PROMPTS, Guidance(k=8, beta=2.0, temperature=temperature), 3)
    assert answers(sequences, 5) == want


def test_rows_that_end_are_padded_as_by_generate(lm: torch.nn.Module, reward: SequenceReward) -> None:
    prompts = [[prompt] for prompt in range(6, 22)]
    settings: dict[str, Any] = {"do_sample": True, "pad_token_id": 60, "max_new_tokens": 40}
    sequences = lm.generate(
        torch.tensor(prompts),
        custom_generate=custom_generate,
        reward=reward,
        guidance=Guidance(k=40, beta=0.2),
        seed=1,
        top_k=0,
        **settings,
    )
    want = expected(prompts, Guidance(k=40, beta=0.2), 1, 40)
    assert answers(sequences, 1, 60) == want
    assert len({len(answer) for answer in want}) > 2  # rows of several lengths
    assert sequences.shape[1] == 1 + max(map(len, want))


def test_eos_of_the_call_ends_a_row(lm: torch.nn.Module, reward: SequenceReward) -> None:
    whole = expected(PROMPTS[:1], Guidance(k=8, beta=2.0, temperature=0))[0]
    sequences = lm.generate(
        torch.tensor(PROMPTS[:1]),
        custom_generate=custom_generate,
        reward=reward,
        guidance=GUIDED,
        eos_token_id=[whole[4]],
        max_new_tokens=NEW,
    )
    assert sequences[0, 3:].tolist() == whole[: whole.index(whole[4]) + 1]


def test_sequences_of_one_prompt_have_seeds_of_their_own(lm: torch.nn.Module, reward: SequenceReward) -> None:
    call = functools.partial(
        lm.generate,
        **padded(PROMPTS[:2]),
        custom_generate=custom_generate,
        reward=reward,
        guidance=GUIDED,
        do_sample=True,
        max_new_tokens=NEW,
        num_return_sequences=3,
    )
    rows = [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    assert answers(call(seed=7), 5) == expected(rows, GUIDED, [7, 8, 9] * 2)
    torch.manual_seed(5)
    first = call()
    second = call()
    torch.manual_seed(5)
    assert torch.equal(call(), first)
    assert not torch.equal(second, first)


def test_stopping_criteria_see_every_step(lm: torch.nn.Module, reward: SequenceReward) -> None:
    seen: list[torch.Tensor] = []

    def second_row_after_five(ids: torch.Tensor, scores: object) -> torch.Tensor:
        seen.append(ids.clone())
        assert scores is None
        return torch.tensor([False, ids.shape[1] >= 10, False])

    sequences = lm.generate(
        **padded(PROMPTS),
        custom_generate=custom_generate,
        reward=reward,
        guidance=GUIDED,
        stopping_criteria=[second_row_after_five],
        max_new_tokens=NEW,
    )
    want = expected(PROMPTS, Guidance(k=8, beta=2.0, temperature=0))
    assert sequences[1, 5:].tolist() == [*want[1][:5], *[0] * (NEW - 5)]
    assert [answers(sequences, 5)[row] for row in (0, 2)] == [want[0], want[2]]
    assert [ids.shape[1] for ids in seen] == list(range(6, 6 + NEW))
    assert all(torch.equal(ids, sequences[:, : ids.shape[1]]) for ids in seen)


def test_the_callers_length_criterion_replaces_that_of_the_config(
    lm: torch.nn.Module, reward: SequenceReward
) -> None:
    sequences = lm.generate(
        torch.tensor(PROMPTS[:1]),
        custom_generate=custom_generate,
        reward=reward,
        guidance=GUIDED,
        stopping_criteria=[MaxLengthCriteria(10)],
        max_new_tokens=NEW,
    )
    want = expected(PROMPTS[:1], Guidance(k=8, beta=2.0, temperature=0))
    assert sequences[0, 3:].tolist() == want[0][:7]


def test_threads_take_turns(lm: torch.nn.Module, reward: SequenceReward) -> None:
    found: dict[int, list[list[int]]] = {}

    def decode(index: int) -> None:
        sequences = lm.generate(
            torch.tensor([PROMPTS[index]]),
            custom_generate=custom_generate,
            reward=reward,
            guidance=GUIDED,
            max_new_tokens=NEW,
        )
        found[index] = answers(sequences, len(PROMPTS[index]))

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = expected(PROMPTS, Guidance(k=8, beta=2.0, temperature=0))
    assert [found[index] for index in range(3)] == [[answer] for answer in want]


@pytest.mark.parametrize("bound", [False, True])
def test_streamers_end(lm: torch.nn.Module, reward: SequenceReward, bound: bool) -> None:
    tokenizer = make_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    settings: dict[str, Any] = {"custom_generate": custom_generate, "streamer": streamer}
    if bound:
        settings = {"custom_generate": functools.partial(custom_generate, streamer=streamer)}
    call = functools.partial(
        lm.generate,
        torch.tensor(PROMPTS[:1]),
        reward=reward,
        guidance=GUIDED,
        max_new_tokens=NEW,
        **settings,
    )
    thread = threading.Thread(target=call)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(expected(PROMPTS[:1], Guidance(k=8, beta=2.0, temperature=0))[0])


def test_return_dict(lm: torch.nn.Module, reward: SequenceReward) -> None:
    found = lm.generate(
        torch.tensor(PROMPTS[:1]),
        custom_generate=custom_generate,
        reward=reward,
        return_dict_in_generate=True,
        max_new_tokens=2,
    )
    assert found.sequences.shape == (1, 5)
    assert found.scores is None


def test_narrow_prompts_become_int64(lm: torch.nn.Module, reward: SequenceReward) -> None:
    """As in generate(): answers may have ids that a prompt's dtype has not."""
    call = functools.partial(lm.generate, custom_generate=custom_generate, reward=reward, guidance=GUIDED)
    prompts = torch.tensor(PROMPTS[:1])
    found = call(prompts.to(torch.uint8), max_new_tokens=3)
    assert found.dtype == torch.int64
    assert torch.equal(found, call(prompts, max_new_tokens=3))


def test_the_models_weights_may_change_between_calls(lm: torch.nn.Module, reward: SequenceReward) -> None:
    """The decoder is kept, follows the weights, and leaves the model in training, copyable and picklable."""
    lm.train()
    call = functools.partial(
        lm.generate,
        torch.tensor(PROMPTS[:1]),
        custom_generate=custom_generate,
        reward=reward,
        guidance=GUIDED,
        max_new_tokens=NEW,
    )
    first = call()
    assert all(module.training for module in lm.modules())
    decoder = vars(lm)["_rgtg_fast_decoder"].decoder
    other = make_lm(seed=9)
    with torch.no_grad():
        for weight, new in zip(lm.parameters(), other.parameters(), strict=True):
            weight.copy_(new)
    second = call()
    assert vars(lm)["_rgtg_fast_decoder"].decoder is decoder
    want = expected(PROMPTS[:1], Guidance(k=8, beta=2.0, temperature=0), lm=other)
    assert not torch.equal(first, second)
    assert answers(second, 3) == want
    assert vars(copy.deepcopy(lm))["_rgtg_fast_decoder"] is None
    assert torch.equal(pickle.loads(pickle.dumps(lm)).lm_head.weight, lm.lm_head.weight)
    lm.double()  # which a decoder cannot follow: a new one is made
    third = call()
    assert vars(lm)["_rgtg_fast_decoder"].decoder is not decoder
    assert answers(third, 3) == answers(second, 3)


def test_a_decoder_of_the_callers(lm: torch.nn.Module) -> None:
    tokenizer = make_tokenizer()
    decoder = RewardGuidedDecoder.from_pretrained((lm, tokenizer), (make_rm(), tokenizer), max_batch=2)
    call = functools.partial(
        lm.generate, **padded(PROMPTS), custom_generate=custom_generate, guidance=GUIDED, max_new_tokens=NEW
    )
    assert answers(call(decoder=decoder), 5) == expected(PROMPTS, Guidance(k=8, beta=2.0, temperature=0))
    assert decoder.max_batch == 2
    with pytest.raises(RGTGError, match="pass one of the two"):
        call(decoder=decoder, reward="contrastive")
    with pytest.raises(RGTGError, match="belongs to another model"):
        make_lm().generate(
            torch.tensor([[5]]), custom_generate=custom_generate, decoder=decoder, max_new_tokens=2
        )


def test_a_reward_over_the_vocabulary(lm: torch.nn.Module) -> None:
    """Support "all" with every token, and rewards that need the tokenizer bound to the callable."""
    guidance = Guidance(beta=0.5, support="all")
    with_tokenizer = functools.partial(custom_generate, tokenizer=make_tokenizer())
    call = functools.partial(
        lm.generate,
        **padded(PROMPTS),
        custom_generate=with_tokenizer,
        reward="contrastive",
        guidance=guidance,
        seed=2,
        do_sample=True,
        max_new_tokens=NEW,
    )
    assert answers(call(top_k=0), 5) == expected(PROMPTS, guidance, 2, reward="contrastive")
    with pytest.raises(RGTGError, match=r"top_k=50 .* would cut the guidance's support='all'"):
        call()


class NoToken(LogitsProcessor):
    """Leaves no token."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf)


class AfterOwnRow(LogitsProcessor):
    """A processor that counts on the batch's rows: row i likes token 20 + i better."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        at = torch.arange(len(scores))
        scores[at, 20 + at] += 2.0
        return scores


@torch.no_grad()
def by_hand(prompt: list[int], row: int, processors: list[Any], guidance: Guidance, new: int) -> list[int]:
    """Greedy decoding of log π + β·r with π after the processors, by uncached forwards."""
    lm, rm, text = make_lm(), make_rm(), list(prompt)
    while len(text) < len(prompt) + new and text[-1] != 1:
        # The row of the batch that a processor sees it in; those before it hold anything.
        ids = torch.tensor([text]).expand(row + 1, -1)
        logits = lm(input_ids=ids[:1]).logits[:, -1].expand(row + 1, -1)
        for processor in processors:
            logits = processor(ids, logits)
        logprobs, candidates = logits[row].log_softmax(-1).topk(guidance.k)
        longer = torch.tensor([[*text, int(token)] for token in candidates])
        # The model itself would read the state before a padding token.
        rewards = rm.score(rm.model(input_ids=longer).last_hidden_state[:, -1])[:, 0]
        text.append(int(candidates[(logprobs + guidance.beta * rewards).argmax()]))
    return text[len(prompt) :]


def test_processors_apply_to_the_base_model(lm: torch.nn.Module, reward: SequenceReward) -> None:
    """Before candidates are selected, at each row's place in the batch, while rows end at different steps."""
    # Of one length: versions of transformers differ in whether a penalty reads padding.
    prompts = [[prompt, 9, prompt + 1] for prompt in range(6, 14)]
    want = []
    for row, prompt in enumerate(prompts):
        processors = [RepetitionPenaltyLogitsProcessor(1.3), AfterOwnRow()]
        want.append(by_hand(prompt, row, processors, GUIDED, NEW))
    end = want[0][4]
    want = [answer[: answer.index(end) + 1] if end in answer else answer for answer in want]
    assert len({len(answer) for answer in want}) > 1
    sequences = lm.generate(
        torch.tensor(prompts),
        custom_generate=custom_generate,
        reward=reward,
        guidance=GUIDED,
        logits_processor=[AfterOwnRow()],
        repetition_penalty=1.3,
        eos_token_id=[1, end],
        max_new_tokens=NEW,
    )
    for row, answer in zip(sequences[:, 3:].tolist(), want, strict=True):
        assert row == answer + [0] * (len(row) - len(answer))


def test_an_answer_may_have_a_shortest_length(lm: torch.nn.Module, reward: SequenceReward) -> None:
    """With every token after which transformers' own loop would end kept from the candidates."""
    whole = expected(PROMPTS[:1], Guidance(k=8, beta=2.0, temperature=0))[0]
    call = functools.partial(
        lm.generate,
        torch.tensor(PROMPTS[:1]),
        custom_generate=custom_generate,
        reward=reward,
        guidance=GUIDED,
        eos_token_id=[whole[2]],
        max_new_tokens=NEW,
    )
    assert call().shape[1] == 3 + whole.index(whole[2]) + 1
    longer = call(min_new_tokens=6)[0, 3:].tolist()
    assert whole[2] not in longer[:6]
    assert len(longer) >= 6


@pytest.mark.parametrize("support", ["combined", "all"])
def test_suppressed_tokens_of_a_vocabulary_reward(lm: torch.nn.Module, support: str) -> None:
    allowed = [5, 9, 12, 30]
    found = lm.generate(
        **padded(PROMPTS),
        custom_generate=functools.partial(custom_generate, tokenizer=make_tokenizer()),
        reward="contrastive",
        guidance=Guidance(k=8, support=support),
        suppress_tokens=[token for token in range(64) if token not in allowed],
        do_sample=True,
        top_k=0,
        max_new_tokens=NEW,
    )
    assert set(found[:, 5:].flatten().tolist()) == set(allowed)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "beam sample"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
    "assistant": ({"assistant_model": "lm"}, "assistant_model"),
    "top_p": ({"do_sample": True, "top_p": 0.9}, r"top_p=0.9 .* pass top_p=1.0"),
    "min_p": ({"do_sample": True, "min_p": 0.1}, r"min_p=0.1 .* pass min_p=None"),
    "top_k": ({"do_sample": True, "top_k": 4}, "top_k=4 .* k=8"),
    "classifier-free": ({"guidance_scale": 1.5}, "guidance_scale=1.5 .* pass guidance_scale=None"),
    "NaN removed": ({"remove_invalid_values": True}, "remove_invalid_values=True"),
    "own top_p": ({"logits_processor": [TopPLogitsWarper(0.5)]}, "TopPLogitsWarper .* leave it out"),
    "own warper": ({"logits_processor": [TemperatureLogitsWarper(0.5)]}, r"TemperatureLogitsWarper\(0.5\)"),
    "nothing allowed": ({"logits_processor": [NoToken()]}, "no candidate of prompt 0, step 0"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation='static'"),
    "cache": ({CACHE: DynamicCache()}, "past_key_values"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    "temperature": ({"guidance": Guidance(temperature=0.5)}, "do_sample=False"),
    "guidance": ({"guidance": 3}, "guidance=3 is not a Guidance"),
    "seed": ({"seed": 0.5}, "seed=0.5"),
    "positions": ({"position_ids": torch.tensor([[0, 3, 4]])}, "position_ids"),
    "empty": ({"attention_mask": torch.zeros(1, 3, dtype=torch.int64)}, "prompt 0 is empty"),
    "embeddings": ({"inputs": None, "inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds"),
    "no reward": ({"reward": None}, "there is no reward"),
    "decoder": ({"reward": None, "decoder": "x"}, "decoder='x' is not a decoder"),
    "shape": ({"inputs": torch.tensor([PROMPTS[:1]])}, r"input_ids have shape \[1, 1, 3\]"),
    "mask": ({"attention_mask": torch.tensor([[2, 1, 1]])}, "mask of 0 and 1"),
    "mask of another width": ({"attention_mask": torch.ones(1, 2, dtype=torch.int64)}, "mask of 0 and 1"),
    "too long": ({"max_new_tokens": 200}, "exceed its 128"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused(lm: torch.nn.Module, reward: SequenceReward, name: str) -> None:
    settings, message = REFUSED[name]
    settings = {"inputs": torch.tensor(PROMPTS[:1]), "max_new_tokens": 3, **settings}
    if settings.get("assistant_model") == "lm":
        settings["assistant_model"] = make_lm()
    settings = {"reward": reward, "guidance": GUIDED, **settings}
    with pytest.raises(RGTGError, match=message) as error:
        lm.generate(custom_generate=custom_generate, **settings)
    assert "\n" not in str(error.value)
