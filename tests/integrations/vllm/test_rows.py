"""The processor of V1's runner follows batches that vLLM orders at will, and what does not fit is refused at start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: `bash tests/integrations/run vllm`")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
    build_logitsprocs,
)
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

from rgtg_fast import Guidance, RequestScorer, RGTGError
from rgtg_fast.integrations.vllm import RewardGuide
from rgtg_fast.integrations.vllm_v1 import RewardGuideV1
from tests.integrations.vllm.support import PROCESSOR, save_models

PLACES, V = 4, 64


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """vLLM calls processors in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def server(models: dict[str, str], length: int = 128, **model: Any) -> Any:
    """What the processor reads of vLLM's configuration."""
    described = {
        "model": models["lm"],
        "dtype": torch.float32,
        "max_model_len": length,
        "is_encoder_decoder": False,
        "is_multimodal_model": False,
        "multimodal_config": None,
        "enable_prompt_embeds": False,
        "get_vocab_size": lambda: V,
    }
    return SimpleNamespace(
        use_v2_model_runner=False,
        model_config=SimpleNamespace(**{**described, **model}),
        scheduler_config=SimpleNamespace(max_num_seqs=PLACES),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )


def make(models: dict[str, str], monkeypatch: Any, reward: str, **described: Any) -> RewardGuideV1:
    monkeypatch.setenv("RGTG_FAST_REWARD", reward)
    made: Any = RewardGuide(server(models, **described), torch.device("cpu"), False)
    return made


def test_both_runners_take_the_class() -> None:
    assert issubclass(RewardGuide, LogitsProcessor)
    assert issubclass(RewardGuide, LogitsProcessorV2)


@pytest.fixture(scope="module")
def guide(models: dict[str, str]) -> RewardGuideV1:
    with pytest.MonkeyPatch.context() as patch:
        return make(models, patch, models["sequence"])


@pytest.fixture(scope="module")
def reference(models: dict[str, str]) -> RequestScorer:
    return RequestScorer.from_pretrained(models["lm"], models["sequence"], max_requests=1, dtype="float32")


class Batch:
    """A batch as vLLM keeps it: requests come into the lowest free place, the rest closes up or is swapped."""

    def __init__(self) -> None:
        self.rows: list[tuple[SamplingParams, list[int], list[int]]] = []

    def change(self, draw: Any) -> BatchUpdate | None:
        removed = sorted(draw(st.sets(st.integers(0, PLACES - 1))) & set(range(len(self.rows))), reverse=True)
        places: list[Any] = [None if at in removed else row for at, row in enumerate(self.rows)]
        added, moved, free = [], [], sorted(removed)
        for _ in range(draw(st.integers(0, PLACES - len(self.rows) + len(removed)))):
            settings = draw(
                st.sampled_from([None, {"rgtg": 0}, {"rgtg_k": 3}, {"rgtg_beta": -2.0, "rgtg_k": 5}])
            )
            params = SamplingParams(max_tokens=8, extra_args=settings)
            prompt = draw(st.lists(st.integers(6, V - 1), min_size=1, max_size=5))
            answer = draw(st.lists(st.integers(6, V - 1), max_size=2))
            at = free.pop(0) if free else len(places)
            places[at:] = [(params, prompt, answer), *places[at + 1 :]]
            added.append((at, params, prompt, answer))
        while None in places:
            last = max((at for at, row in enumerate(places) if row is not None), default=-1)
            empty = places.index(None)
            if last < empty:
                break
            moved.append((last, empty, MoveDirectionality.UNIDIRECTIONAL))
            places[empty], places[last] = places[last], None
        places = [row for row in places if row is not None]
        if len(places) > 1 and draw(st.booleans()):
            one, other = draw(st.permutations(range(len(places))))[:2]
            moved.append((one, other, MoveDirectionality.SWAP))
            places[one], places[other] = places[other], places[one]
        self.rows = places
        # Places that were taken again are no longer among the removed ones.
        gone = [at for at in removed if at in free]
        if not (gone or added or moved):
            return None
        return BatchUpdate(batch_size=len(places), removed=gone, added=added, moved=moved)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_in_any_order(data: st.DataObject, guide: RewardGuideV1, reference: RequestScorer) -> None:
    """Each row is guided as if it were alone, to the last bit; unguided rows are the same bits."""
    assert guide.scorer is not None
    batch = Batch()
    try:
        for _ in range(data.draw(st.integers(1, 6))):
            guide.update_state(batch.change(data.draw))
            if not batch.rows:
                continue
            seed = data.draw(st.integers(0, 1000))
            logits = torch.randn(len(batch.rows), V, generator=torch.Generator().manual_seed(seed))
            out = guide.apply(logits.clone())
            for at, (params, prompt, answer) in enumerate(batch.rows):
                asked = guide.settings.guidance_of(params.extra_args)
                assert torch.equal(
                    out[at],
                    logits[at] if asked is None else alone(reference, prompt, answer, logits[at], asked),
                )
                # Some rows are in the middle of their prompt: nothing is decided there.
                if data.draw(st.booleans()):
                    allowed = out[at].isfinite().nonzero().flatten().tolist()
                    answer.append(data.draw(st.sampled_from(allowed)))
    finally:
        everything = BatchUpdate(batch_size=0, removed=list(range(len(batch.rows))), added=[], moved=[])
        guide.update_state(everything)
    assert len(guide.scorer) == 0


def alone(
    scorer: RequestScorer, prompt: list[int], answer: list[int], logits: torch.Tensor, guidance: Guidance
) -> torch.Tensor:
    request = scorer.add(prompt, answer)
    try:
        return scorer.guide([request], logits[None], guidance)[0]
    finally:
        scorer.drop(request)


def test_a_request_that_cannot_be_guided_ends_alone(
    guide: RewardGuideV1, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one with more tokens than the reward model reads, or ids that it does not know."""
    assert guide.scorer is not None
    params = SamplingParams(max_tokens=8)
    added = [
        (0, params, [7, 8], []),
        (1, params, [7] * 200, []),
        (2, params, [7, 900], []),
        (3, params, [9], [-1]),
    ]
    guide.update_state(BatchUpdate(batch_size=4, removed=[], added=added, moved=[]))
    with caplog.at_level("ERROR", logger="vllm.rgtg_fast"):
        out = guide.apply(torch.zeros(4, V))
    assert out[0].isfinite().sum() == 10
    for row in out[1:]:
        assert row.isfinite().nonzero().flatten().tolist() == [1]
    assert len(caplog.messages) == 3
    assert not [message for message in caplog.messages if "\n" in message]
    guide.update_state(BatchUpdate(batch_size=0, removed=[3, 2, 1, 0], added=[], moved=[]))
    assert len(guide.scorer) == 0


def test_what_only_the_engine_refuses_ends_its_request_alone(
    guide: RewardGuideV1, caplog: pytest.LogCaptureFixture
) -> None:
    """The front end reads the settings again, whose file may have changed: it let k=500 through. And no prompt."""
    assert guide.scorer is not None
    params, large = SamplingParams(max_tokens=8), SamplingParams(max_tokens=8, extra_args={"rgtg_k": 500})
    added = [(0, params, [7, 8], []), (1, large, [7, 8], []), (2, params, None, [])]
    with caplog.at_level("ERROR", logger="vllm.rgtg_fast"):
        guide.update_state(BatchUpdate(batch_size=3, removed=[], added=added, moved=[]))
        out = guide.apply(torch.zeros(3, V))
    assert out[0].isfinite().sum() == 10
    for row in out[1:]:
        assert row.isfinite().nonzero().flatten().tolist() == [1]
    assert "rgtg_k=500 is above 100" in caplog.messages[0]
    assert "is empty" in caplog.messages[1]
    guide.update_state(BatchUpdate(batch_size=0, removed=[2, 1, 0], added=[], moved=[]))
    assert len(guide.scorer) == 0


REFUSED = {
    "no reward model": ("/no/such/folder", {}, "reward model '/no/such/folder' does not exist"),
    "no bundled one": ("bundled:none", {}, "'bundled:none' is not a bundled reward model"),
    "context": (
        "{short}",
        {},
        "reads requests of up to 64 tokens and the server takes 128: start it with --max",
    ),
    "instructions": ("contrastive", {"length": 512}, "contrastive reads requests of up to"),
    "images": ("{sequence}", {"is_multimodal_model": True}, "add --language-model-only"),
    "embeddings": ("{sequence}", {"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
    "encoder": ("{sequence}", {"is_encoder_decoder": True}, "decoder-only"),
    "vocabulary of the server": (
        "{sequence}",
        {"get_vocab_size": lambda: 48},
        "has 64 tokens and the served model 48",
    ),
    "vocabulary of the reward": ("genarm:{smaller}", {}, "vocabulary"),
    "base model": ("{sequence}", {"model": "/no/such/model"}, "'/no/such/model' does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(
    case: str, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward, described, message = REFUSED[case]
    with pytest.raises(RGTGError) as error:
        make(models, monkeypatch, reward.format(**models), **described)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


FILES = {
    "reward: {sequence}\nbeta: much": "beta='much' is not a number",
    "reward: {sequence}\nsupport: all": "support='all' needs a reward over the whole vocabulary",
    "reward: {sequence}\nmax_requests: 2": "max_requests=2 is below the 4 requests",
    "reward: {sequence}\nbetta: 1": "'betta' is unknown",
    "reward: {sequence}\ndtype: float33": "float33",
    "reward: {sequence}\nk: 200": "k=200 is above max_k=100",
    "beta: 1": "names no reward",
    "reward: [": "is neither YAML nor JSON",
}


@pytest.mark.parametrize("text", FILES)
def test_bad_settings_are_refused_in_one_line(
    text: str, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "guide.yaml"
    path.write_text(text.replace("{sequence}", models["sequence"]))
    monkeypatch.delenv("RGTG_FAST_REWARD", raising=False)
    monkeypatch.setenv("RGTG_FAST_CONFIG", str(path))
    with pytest.raises(RGTGError) as error:
        RewardGuide(server(models), torch.device("cpu"), False)
    assert FILES[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_what_vllm_refuses_and_validates_itself(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speculative decoding on V1, and requests on V2, whose front end loads the class by itself."""
    monkeypatch.setenv("RGTG_FAST_REWARD", models["sequence"])
    with pytest.raises(ValueError, match="not supported when speculative decoding is enabled"):
        build_logitsprocs(
            SimpleNamespace(speculative_config=object()), torch.device("cpu"), False, False, [PROCESSOR]
        )
    validate = build_custom_logits_processors_params_validator([PROCESSOR])
    validate(SamplingParams(extra_args={"rgtg_k": 3}))
    with pytest.raises(VLLMValidationError, match="rgtg_k=0 is below 1"):
        validate(SamplingParams(extra_args={"rgtg_k": 0}))


def test_pipeline_ranks_without_logits_load_nothing(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RGTG_FAST_REWARD", models["sequence"])
    ranks = SimpleNamespace(is_last_rank=False)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_pp_group", lambda: ranks)
    config = server(models)
    config.parallel_config.pipeline_parallel_size = 2
    made: Any = RewardGuide(config, torch.device("cpu"), False)
    assert made.scorer is None
    added = [(0, SamplingParams(max_tokens=8), [7, 8], [])]
    made.update_state(BatchUpdate(batch_size=1, removed=[], added=added, moved=[]))
    ranks.is_last_rank = True
    last: Any = RewardGuide(config, torch.device("cpu"), False)
    assert last.scorer.max_requests == PLACES
