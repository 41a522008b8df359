"""The example for SGLang with stand-ins for SGLang's base class and requests; no server runs here."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError
from tests.conftest import make_lm, make_rm, make_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "sglang_processor.py"
PROMPTS = [[6, 7, 8], [9, 10], [11, 12, 13, 14], [15], [16, 17]]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    base = ModuleType("sglang.srt.sampling.custom_logit_processor")
    base.CustomLogitProcessor = object  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("sglang", "sglang.srt", "sglang.srt.sampling"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    for name, model in {"lm": make_lm(), "rm": make_rm()}.items():
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.setenv("RGTG_FAST_LM", str(tmp_path / "lm"))
    monkeypatch.setenv("RGTG_FAST_REWARD", str(tmp_path / "rm"))
    monkeypatch.setenv("RGTG_FAST_MAX_REQUESTS", "3")
    spec = importlib.util.spec_from_file_location("sglang_processor", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def request(number: int) -> Any:
    return SimpleNamespace(rid=f"r{number}", origin_input_ids=PROMPTS[number], output_ids=[])


def step(example: ModuleType, batch: list[Any], settings: list[dict[str, Any] | None]) -> None:
    """One step of a server: every request of the batch gets its greedy token from a new processor's logits."""
    lm = make_lm()
    rows = []
    for each in batch:
        ids = torch.tensor([each.origin_input_ids + each.output_ids])
        with torch.no_grad():
            rows.append(lm(ids).logits[0, -1])
    given = [
        None if own is None else {**own, "__req__": each} for own, each in zip(settings, batch, strict=True)
    ]
    logits = example.GuideProcessor()(torch.stack(rows), given)
    for each, token in zip(batch, logits.argmax(-1).tolist(), strict=True):
        each.output_ids.append(token)


def test_requests_in_changing_batches_get_the_decoders_tokens(example: ModuleType) -> None:
    """Five requests over three places: they come, pause and go on, and one of each batch is not guided."""
    settings: list[dict[str, Any] | None] = [
        {"rgtg_beta": 2.0, "rgtg_k": 4},
        {"rgtg_beta": -1.0},
        None,
        {},
        {"rgtg_beta": 3.0, "rgtg_k": 6},
    ]
    requests = [request(number) for number in range(5)]
    for batch in ([0, 1], [2, 3], [0, 1, 2, 3], [4, 0], [1, 3, 4], [0, 2], [0, 1, 3], [4, 2, 0], [2, 1, 4]):
        step(example, [requests[at] for at in batch], [settings[at] for at in batch])
    decoder = RewardGuidedDecoder.from_pretrained(
        (make_lm(), make_tokenizer()), reward=(make_rm(), make_tokenizer())
    )
    for number, own in enumerate(settings):
        given = own or {"rgtg_beta": 0.0}
        guidance = Guidance(k=given.get("rgtg_k", 10), beta=given.get("rgtg_beta", 1.0), temperature=0)
        found = requests[number].output_ids
        wanted = decoder.generate(PROMPTS[number], len(found), guidance)[0]
        tokens = wanted.tokens + ([] if wanted.end_token is None else [wanted.end_token])
        assert found[: len(tokens)] == tokens, number
        assert len(found) >= 4
    assert len(example.requests_of_server().scorer) <= 3


def test_a_scheduler_that_runs_ahead_is_refused(example: ModuleType) -> None:
    only = request(0)
    step(example, [only], [{}])
    only.output_ids.clear()
    with pytest.raises(RGTGError, match="--disable-overlap-schedule"):
        step(example, [only], [{}])
