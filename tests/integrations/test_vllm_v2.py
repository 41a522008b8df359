"""The processor of vLLM's V2 runner, driven as that runner drives it; the runner itself needs a GPU.

Where vLLM is not installed, empty classes stand in for the two interfaces that it would provide.
"""

from __future__ import annotations

import enum
import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError
from tests.conftest import make_lm, make_rm, make_tokenizer

SLOTS, LENGTH, STEPS = 3, 64, 6
V1, V2 = "vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor"
ASKED: list[dict[str, Any]] = [
    {},
    {"rgtg": 0},
    {"rgtg_beta": 2.5, "rgtg_k": 4},
    {"rgtg_beta": -1},
    {"rgtg_k": 100},
    {"rgtg": "off"},
    {"rgtg_beta": 0.3},
]


@pytest.fixture
def guide_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`RewardGuide`, over vLLM's interfaces or what stands in for them."""
    if importlib.util.find_spec("vllm") is None:
        for name in ("vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.worker", "vllm.v1.worker.gpu"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.sample", ModuleType("sample"))
        for name in (V1, V2):
            module: Any = ModuleType(name)
            module.LogitsProcessor = type("LogitsProcessor", (), {"apply_staged_writes": lambda self: None})
            module.MoveDirectionality = enum.Enum("MoveDirectionality", "UNIDIRECTIONAL SWAP")
            monkeypatch.setitem(sys.modules, name, module)
    ours = [name for name in sys.modules if name.startswith("rgtg_fast.integrations.vllm")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    from rgtg_fast.integrations.vllm import RewardGuide

    yield RewardGuide
    for name in [name for name in sys.modules if name.startswith("rgtg_fast.integrations.vllm")]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, model in {"lm": make_lm(), "sequence": make_rm(), "farma": make_lm(3)}.items():
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


class Request:
    def __init__(self, prompt: list[int], asked: dict[str, Any]):
        self.prompt, self.asked = prompt, asked
        self.answer: list[int] = []
        self.slot = self.computed = 0
        self.cancelled = False

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.answer]

    @property
    def ended(self) -> bool:
        return self.cancelled or len(self.answer) == STEPS or self.answer[-1:] == [1]


class Engine:
    """A model runner that recycles slots without telling, with chunked prompts, preempted and cancelled requests."""

    def __init__(self, folder: Path, guide_class: Any, seed: int):
        self.lm, self.rng = make_lm(), random.Random(seed)
        zeros = torch.zeros(SLOTS, LENGTH, dtype=torch.int32)
        self.tokens, self.total = zeros, torch.zeros(SLOTS, dtype=torch.int32)
        self.prompt_len = np.zeros(SLOTS, dtype=np.int32)
        states = SimpleNamespace(
            device=torch.device("cpu"), max_num_reqs=SLOTS, vocab_size=64,
            all_token_ids=SimpleNamespace(gpu=self.tokens), total_len=SimpleNamespace(gpu=self.total),
            prompt_len=SimpleNamespace(np=self.prompt_len),
        )  # fmt: skip
        self.processor = guide_class(config(folder), states)
        self.free, self.running = list(range(SLOTS)), []
        self.steps_of_chunks = self.preempted = 0

    def run(self, requests: list[Request]) -> None:
        waiting, rng = list(requests), self.rng
        while waiting or self.running:
            while waiting and self.free and rng.random() < 0.7:
                self.admit(waiting.pop(0))
            for request in list(self.running):
                if rng.random() < 0.08:
                    self.remove(request)
                    self.preempted += 1
                    waiting.insert(0, request)
            rng.shuffle(self.running)
            scheduled = [request for request in self.running if rng.random() < 0.8]
            if scheduled:
                self.step(scheduled)
            for request in list(self.running):
                request.cancelled |= rng.random() < 0.01
                if request.ended:
                    self.remove(request)

    def admit(self, request: Request) -> None:
        request.slot, request.computed = self.free.pop(), 0
        self.running.append(request)
        self.prompt_len[request.slot] = len(request.prompt)
        self.tokens[request.slot] = 63  # what the last request left
        self.tokens[request.slot, : len(request.ids)] = torch.tensor(request.ids, dtype=torch.int32)
        self.total[request.slot] = len(request.ids)
        params = SimpleNamespace(extra_args=request.asked or None, all_stop_token_ids={1})
        assert self.processor.add_request(request.slot, params) is ("rgtg" not in request.asked)

    def remove(self, request: Request) -> None:
        self.running.remove(request)
        self.free.append(request.slot)

    @torch.inference_mode()
    def step(self, scheduled: list[Request]) -> None:
        ends = []
        for request in scheduled:
            rest = len(request.ids) - request.computed
            request.computed += self.rng.randint(1, rest) if self.rng.random() < 0.5 else rest
            ends.append(request.computed)
        texts = [request.ids[:end] for request, end in zip(scheduled, ends, strict=True)]
        logits = torch.stack([self.lm(torch.tensor([ids])).logits[0, -1] for ids in texts])
        slots = [request.slot for request in scheduled]
        ctx = SimpleNamespace(
            expanded_idx_mapping=torch.tensor(slots), idx_mapping=torch.tensor(slots), idx_mapping_np=np.array(slots),
            pos=torch.tensor(ends) - 1,
        )  # fmt: skip
        self.processor.apply_staged_writes()
        guided = self.processor.apply(logits.clone(), ctx)
        for row, (request, end) in enumerate(zip(scheduled, ends, strict=True)):
            if "rgtg" in request.asked:
                assert torch.equal(guided[row], logits[row])
            if end < len(request.ids):
                self.steps_of_chunks += 1
                continue
            token = int(guided[row].argmax())
            self.tokens[request.slot, len(request.ids)] = token
            request.answer.append(token)
            self.total[request.slot] += 1


def config(folder: Path, **changes: Any) -> SimpleNamespace:
    model = SimpleNamespace(
        model=str(folder / "lm"), is_encoder_decoder=False, is_multimodal_model=False, multimodal_config=None,
        enable_prompt_embeds=False, max_model_len=LENGTH, dtype=torch.float32, get_vocab_size=lambda: 64,
    )  # fmt: skip
    settings = {
        "model_config": model,
        "scheduler_config": SimpleNamespace(max_num_seqs=SLOTS),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
        "speculative_config": None,
        "use_v2_model_runner": True,
    }
    return SimpleNamespace(**{**settings, **changes})


@pytest.mark.parametrize(
    ("name", "seed"), [("sequence", 0), ("farma", 2), pytest.param("sequence", 1, marks=pytest.mark.slow)]
)
def test_random_schedules_give_the_decoders_tokens(
    folder: Path, guide_class: Any, monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    reward = str(folder / name) if name == "sequence" else f"farma:{folder / name}"
    monkeypatch.setenv("RGTG_FAST_REWARD", reward)
    engine, rng = Engine(folder, guide_class, seed), random.Random(seed)
    requests = [
        Request([rng.randrange(6, 64) for _ in range(rng.randrange(1, 12))], ASKED[i % len(ASKED)])
        for i in range(14)
    ]
    engine.run(requests)
    assert type(engine.processor).__name__ == "RewardGuideV2"
    assert engine.steps_of_chunks > 5
    assert engine.preempted > 0
    assert len(engine.processor._guide.scorer) <= SLOTS
    guided = RewardGuidedDecoder.from_pretrained(folder / "lm", reward)
    plain = RewardGuidedDecoder.from_pretrained(folder / "lm")
    finished = [request for request in requests if not request.cancelled]
    differ = 0
    for request in finished:
        changes = {key.removeprefix("rgtg_"): value for key, value in request.asked.items() if key != "rgtg"}
        changes["k"] = min(changes.get("k", 10), 64)
        decoder = plain if "rgtg" in request.asked else guided
        (row,) = decoder.generate([request.prompt], STEPS, Guidance(temperature=0, **changes))
        assert [token for token in request.answer if token != 1] == row.tokens
        (alone,) = plain.generate([request.prompt], STEPS, Guidance(temperature=0))
        differ += alone.tokens != row.tokens
    assert len(finished) > 8
    assert differ > 3


def test_what_the_runner_cannot_do_is_refused(
    folder: Path, guide_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RGTG_FAST_REWARD", str(folder / "sequence"))
    states = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(RGTGError, match="without speculative decoding"):
        guide_class(config(folder, speculative_config=object()), states)
    with pytest.raises(ValueError, match="rgtg_beta"):
        guide_class.validate_params(SimpleNamespace(extra_args={"rgtg_beta": "x"}))


def test_what_only_the_engine_refuses_ends_its_request(
    folder: Path, guide_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The front end reads the settings again, whose file may have changed: it let k=500 through."""
    monkeypatch.setenv("RGTG_FAST_REWARD", str(folder / "sequence"))
    engine = Engine(folder, guide_class, 0)
    request = Request([7, 8], {"rgtg_k": 500})
    engine.run([request])
    assert request.answer == [1]
    assert len(engine.processor._guide.scorer) == 0
