"""The benchmark measures what it says, compares outputs first, and never hides that they differ."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation import baselines, benchmark
from rgtg_fast.evaluation.baselines import BaselineRun
from rgtg_fast.evaluation.benchmark import BenchmarkMismatchError, Difference, first_difference, run_bench

TINY = {
    "shape": "tiny",
    "prompt_length": 12,
    "k": 4,
    "batch": 2,
    "new_tokens": 6,
    "repeats": 2,
    "device": "cpu",
}
ALL = ("ours", "ours_transformers", "args_replicated", "pargs_serial", "unguided")


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch):
    monkeypatch.setattr(benchmark, "memory_bandwidth", lambda device="cpu": 10e9)


@pytest.fixture(scope="module")
def result():
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "memory_bandwidth", lambda device="cpu": 10e9)
        measured = run_bench(**TINY, methods=ALL, progress=told.append)
    return measured, told


def methods(measured):
    return {row["method"]: row for row in measured["methods"]}


def test_every_method_is_reported_with_equal_tokens(result):
    rows = methods(result[0])
    assert tuple(rows) == ALL
    for name, row in rows.items():
        assert row["equal_to_reference"] is (None if name == "unguided" else True)
        assert row["tokens_compared"] == (0 if name == "unguided" else 12)
        assert row["tokens"] == 12
        assert row["runs"] == 2
        assert not row["extrapolated"]
        assert row["tokens_per_second"] == pytest.approx(12 / row["seconds"])
        assert row["ms_per_token"] == pytest.approx(sum(row["phases"].values()))
        assert row["rows_one_after_another"] is (name in ("args_replicated", "pargs_serial"))


def test_the_result_is_json_and_names_its_machine(result):
    measured = json.loads(json.dumps(result[0]))
    assert {"cpu", "cores", "threads", "memory_bandwidth_gb_s", "python", "torch", "commit"} <= set(
        measured["machine"]
    )
    assert measured["config"]["reference"] == "args_replicated"


def test_methods_take_turns(result):
    runs = [line for line in result[1] if line.startswith("run ")]
    assert runs == [f"run {turn} of 2: {name}" for turn in (1, 2) for name in ALL]


def test_the_floor_counts_both_models_weights_once_a_step(result):
    floor = methods(result[0])["ours"]["floor"]
    trunk = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64) + 64
    lm, rm = trunk + 256 * 64, trunk + 64
    assert floor["weight_bytes_per_token"] == 4 * (lm + rm) / 2
    # 14.5 tokens of prefix on average, 2 models, keys and values, 2 layers, 2 groups of 16 numbers
    assert floor["cache_bytes_per_token"] == 14.5 * 2 * 2 * 2 * 2 * 16 * 4
    read = floor["weight_bytes_per_token"] + floor["cache_bytes_per_token"]
    assert floor["floor_ms_per_token"] == pytest.approx(read / 10e9 * 1e3)


def test_our_reward_cache_is_not_replicated(result):
    rows = methods(result[0])
    per_token = 2 * 2 * 2 * 16 * 4
    assert rows["args_replicated"]["cache_resident_bytes"]["reward"] == 4 * (12 + 6) * per_token
    # two rows at once, with room for their candidates
    assert rows["ours"]["cache_resident_bytes"]["reward"] <= 2 * (12 + 6 + 4) * per_token


def test_slow_methods_are_cut_and_say_so():
    rows = methods(run_bench(**TINY, methods=("ours", "pargs_serial", "unguided"), seconds_per_run=1e-9))
    serial = rows["pargs_serial"]
    assert (serial["runs"], serial["rows_measured"], serial["tokens_measured"]) == (1, 1, 2)
    assert serial["extrapolated"]
    prefill = serial["phases"]["prefill"] * 12 / 2 / 1e3
    decoding = serial["seconds_of_every_run"][0] - prefill
    assert serial["seconds"] == pytest.approx((prefill + decoding * 6 / 2) * 2)
    assert serial["tokens_per_second"] == pytest.approx(12 / serial["seconds"])
    assert serial["ms_per_token"] == pytest.approx(sum(serial["phases"].values()))


def wrong(lm, rm, prompts, *, k, beta, new_tokens):
    run = baselines.args_replicated(lm, rm, prompts, k=k, beta=beta, new_tokens=new_tokens)
    candidates, scores = run.steps[0][1]
    second = int(candidates[scores.argsort(descending=True)[1]])
    run.tokens[0][1] = second
    return run


def test_a_difference_in_float32_is_an_error(monkeypatch):
    monkeypatch.setattr(baselines, "pargs_serial", wrong)
    with pytest.raises(
        BenchmarkMismatchError, match=r"pargs_serial differs from args_replicated .* new token 1"
    ):
        run_bench(**TINY, methods=("ours", "args_replicated", "pargs_serial"))


def test_a_difference_in_bfloat16_is_reported_with_its_score_gap(monkeypatch):
    monkeypatch.setattr(baselines, "pargs_serial", wrong)
    rows = methods(run_bench(**TINY, dtype="bfloat16", methods=("args_replicated", "pargs_serial")))
    assert rows["args_replicated"]["equal_to_reference"] is True
    assert rows["pargs_serial"]["equal_to_reference"] is False
    difference = rows["pargs_serial"]["first_difference"]
    assert (difference["row"], difference["position"]) == (0, 1)
    assert 0 <= difference["score_gap"] < 5


def test_a_method_that_stops_early_is_not_timed(monkeypatch):
    monkeypatch.setattr(baselines, "unguided", lambda lm, prompts, *, new_tokens: BaselineRun([[1]], 1.0, {}))
    with pytest.raises(RGTGError, match="unguided produced 1 tokens instead of 6"):
        run_bench(**TINY, methods=("unguided",))


def test_first_difference():
    step = (torch.tensor([7, 3, 5]), torch.tensor([0.5, 2.0, 1.25]))
    reference = BaselineRun([[1, 3, 9], [4]], 1.0, {}, steps=[[step] * 3, [step]])
    assert first_difference(reference, BaselineRun([[1, 3], [4]], 1.0, {})) is None
    assert first_difference(reference, BaselineRun([[1, 5, 9]], 1.0, {})) == Difference(0, 1, 3, 5, 0.75)
    assert first_difference(reference, BaselineRun([[1, 8, 9]], 1.0, {})) == Difference(0, 1, 3, 8, None)
    assert first_difference(BaselineRun([[1]], 1.0, {}), BaselineRun([[2]], 1.0, {})).score_gap is None


def test_a_model_by_path_runs_past_its_end_of_sequence(models, tmp_path):
    lm, _ = models
    lm.save_pretrained(tmp_path)
    words = WordLevel({f"w{i}": i for i in range(lm.config.vocab_size)}, unk_token="w0")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="w0", eos_token="w1", pad_token="w0"
    ).save_pretrained(tmp_path)
    rows = methods(
        run_bench(lm=str(tmp_path), prompt_length=5, k=60, batch=2, new_tokens=40, repeats=1, device="cpu")
    )
    assert {row["equal_to_reference"] for row in rows.values()} == {True, None}


def test_nothing_global_is_left_behind():
    threads = torch.get_num_threads()
    torch.manual_seed(7)
    random.seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run_bench(**{**TINY, "repeats": 1}, methods=("unguided",), threads=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": None}, "name one of them"),
        ({"lm": "x"}, "name one of them"),
        ({"shape": "gpt5"}, "shape='gpt5' is unknown"),
        ({"rm": "x"}, "does not fit random weights"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("ours", "theirs")}, "method 'theirs' is unknown"),
        ({"methods": ("ours", "ours")}, "name one twice"),
        ({"k": 0}, "k=0"),
        ({"k": 257}, "k=257 exceeds the vocabulary"),
        ({"batch": 0}, "batch=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"prompt_length": 0}, "prompt_length=0"),
        ({"prompt_length": 4096}, "exceeds the context"),
        ({"threads": 0}, "threads=0"),
        ({"seconds_per_run": 0.0}, "seconds_per_run=0"),
        ({"beta": float("nan")}, "beta=nan"),
    ],
)
def test_bad_input_is_refused_in_one_line(change, message):
    with pytest.raises(RGTGError, match=message) as error:
        run_bench(**{**TINY, **change})
    assert "\n" not in str(error.value)


def test_an_adapter_is_timed_in_one_forward_and_as_two_models():
    names = ("shared_trunk", "two_models", "args_replicated", "unguided", "ours_unguided")
    rows = methods(run_bench(**{**TINY, "repeats": 1}, methods=names))
    assert [rows[name]["equal_to_reference"] for name in names] == [True, True, True, None, None]
    # one copy of the weights and the adapter's factors, against two copies
    alone = rows["ours_unguided"]["weight_bytes"]
    assert rows["unguided"]["weight_bytes"] == alone
    assert alone < rows["shared_trunk"]["weight_bytes"] < 1.5 * alone
    assert rows["two_models"]["weight_bytes"] > 1.7 * alone
    # the upper layer's cache twice, the lower one's once
    kept = {name: rows[name]["floor"]["cache_bytes_per_token"] for name in names if "floor" in rows[name]}
    assert kept["shared_trunk"] == pytest.approx(1.5 * kept["ours_unguided"])
    assert kept["two_models"] == pytest.approx(2 * kept["ours_unguided"])


def test_only_an_adapter_is_shared(tmp_path):
    with pytest.raises(RGTGError, match="is no adapter folder, which two_models needs"):
        benchmark._adapter(str(tmp_path), None, ["ours", "two_models"], 0)
