"""The benchmark measures what it says, compares outputs first, and never hides that they differ."""

import gc
import json
import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rgtg_fast.bench import baselines, models, roofline, run, timing
from rgtg_fast.bench.baselines import BaselineRun
from rgtg_fast.bench.methods import METHODS
from rgtg_fast.bench.run import BenchmarkMismatchError, BenchSettings, run_bench
from rgtg_fast.bench.timing import Isolation, TimedMethod, TokenDifference, first_difference
from rgtg_fast.errors import MemoryTooSmallError, RGTGError
from rgtg_fast.ops._extension import instruction_set

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
    monkeypatch.setattr(roofline, "memory_bandwidth", lambda device="cpu": 10e9)


@pytest.fixture(scope="module")
def result():
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "memory_bandwidth", lambda device="cpu": 10e9)
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
    assert measured["left_out"] == {}
    assert {row["method"]: row["reference"] for row in measured["methods"]} == {
        name: None if name == "unguided" else "args_replicated" for name in ALL
    }


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
    assert first_difference(reference, BaselineRun([[1, 5, 9]], 1.0, {})) == TokenDifference(0, 1, 3, 5, 0.75)
    assert first_difference(reference, BaselineRun([[1, 8, 9]], 1.0, {})) == TokenDifference(0, 1, 3, 8, None)
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
        ({"prompt_length": 8192}, "exceeds the context"),
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


GENARM = ("ours_genarm", "genarm_published")


@pytest.fixture(scope="module")
def with_genarm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "memory_bandwidth", lambda device="cpu": 10e9)
        return run_bench(**{**TINY, "repeats": 1}, methods=(*ALL, *GENARM, "ours_unguided"))


def test_methods_with_a_second_language_model_agree_with_each_other(with_genarm):
    rows = methods(with_genarm)
    for name in GENARM:
        assert (rows[name]["reference"], rows[name]["equal_to_reference"]) == ("genarm_published", True)
        assert rows[name]["tokens_compared"] == 12
        assert not rows[name]["rows_one_after_another"]
    assert rows["ours"]["reference"] == "args_replicated"
    assert rows["ours_unguided"]["reference"] is None


def test_the_floor_of_two_language_models_counts_both_heads_and_caches(with_genarm):
    rows = methods(with_genarm)
    # the second head is a matrix of its own: its input embedding is looked up, not read
    trunk = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64) + 64
    for name in GENARM:
        assert rows[name]["weight_bytes"] == 2 * 4 * (trunk + 256 * 64)
    floor = rows["ours_genarm"]["floor"]
    assert floor["weight_bytes_per_token"] == rows["ours_genarm"]["weight_bytes"] / 2
    assert floor["cache_bytes_per_token"] == 2 * rows["ours_unguided"]["floor"]["cache_bytes_per_token"]
    assert rows["ours"]["weight_bytes"] == 4 * (trunk + 256 * 64 + trunk + 64)


@pytest.mark.parametrize("tied", [True, False])
def test_the_second_language_model_shares_nothing_but_values(tied):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {**models.SHAPES["tiny"], "tie_word_embeddings": tied}
        base = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    second = models.second_language_model(base, 3)
    own = {tensor.data_ptr() for tensor in base.state_dict().values()}
    for name, tensor in second.state_dict().items():
        assert tensor.data_ptr() not in own
        assert torch.equal(tensor, before[name]) is (name != "lm_head.weight")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert base.config.tie_word_embeddings is tied
    assert second.get_output_embeddings().weight is not second.get_input_embeddings().weight
    again = models.second_language_model(base, 3).lm_head.weight
    assert torch.equal(second.lm_head.weight, again)


def wrong_genarm(lm, rm, prompts, *, beta, new_tokens):
    run = genarm(lm, rm, prompts, beta=beta, new_tokens=new_tokens)
    run.tokens[1][2] = int(run.steps[1][2][0][1])
    return run


genarm = baselines.genarm_published


def test_a_difference_between_the_two_genarms_is_an_error_in_float32_and_told_in_bfloat16(monkeypatch):
    monkeypatch.setattr(baselines, "genarm_published", wrong_genarm)
    with pytest.raises(
        BenchmarkMismatchError, match=r"ours_genarm differs from genarm_published .* prompt 1, new token 2"
    ):
        run_bench(**TINY, methods=("ours", *GENARM))
    rows = methods(run_bench(**{**TINY, "repeats": 1}, dtype="bfloat16", methods=("ours", *GENARM)))
    assert rows["ours"]["equal_to_reference"] is True
    assert rows["ours_genarm"]["equal_to_reference"] is False


class Counters:
    """Stands in for the device's allocator: what is allocated now, and the most since the last reset."""

    def __init__(self, monkeypatch):
        self.now = self.most = 1000  # weights
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device=None):
        self.most = self.now

    def allocate(self, size):
        self.now += size
        self.most = max(self.most, self.now)


def counted(counters, kept, transient, device="cuda"):
    """A method whose n-th run leaves kept[n] bytes allocated and has transient[n] more in between."""
    numbers = iter(zip(kept, transient, strict=True))

    def call(prompts, tokens):
        own, passing = next(numbers)
        counters.allocate(own + passing)
        counters.allocate(-passing)
        return BaselineRun([[0] * tokens], 1.0, {})

    return TimedMethod(METHODS["ours"], call, "", torch.device(device), rows=1)


def test_memory_beyond_the_weights_is_what_stays_and_what_a_run_adds(monkeypatch):
    counters = Counters(monkeypatch)
    # static caches of 70 and a graph recorded with 30 passing bytes; later runs pass 20, then 45, through
    static = counted(counters, kept=(70, 0, 0), transient=(30, 20, 45))
    # nothing stays: the whole peak is of one run
    growing = counted(counters, kept=(0, 0, 0), transient=(5, 60, 50))
    for _ in range(3):
        static.run([[1]], 2)
        growing.run([[1]], 2)
    assert (static.resident_bytes, static.peak_bytes) == (70, 70 + 45)
    assert (growing.resident_bytes, growing.peak_bytes) == (0, 60)


def test_caches_that_grow_count_at_their_larger_size(monkeypatch):
    method = counted(Counters(monkeypatch), kept=(40, 25), transient=(10, 0))
    method.run([[1]], 2)
    assert (method.resident_bytes, method.peak_bytes) == (40, 50)
    method.run([[1]], 2)
    assert (method.resident_bytes, method.peak_bytes) == (65, 65)


def test_what_another_method_left_behind_is_not_subtracted(monkeypatch):
    counters = Counters(monkeypatch)

    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            counters.allocate(-500)

    method = counted(counters, kept=(40,), transient=(10,))
    gc.collect()
    counters.allocate(500)
    Cycle()
    method.run([[1]], 2)
    assert (method.resident_bytes, method.peak_bytes) == (40, 50)


def test_a_cpu_has_no_such_memory(with_genarm):
    assert {row["memory_beyond_weights_bytes"] for row in with_genarm["methods"]} == {None}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError, "the device's memory does not suffice"),
        (MemoryTooSmallError, "the device's memory does not suffice"),
        (RuntimeError, "RuntimeError: no room in a capture"),
    ],
)
def test_a_method_that_fails_is_left_out_and_the_others_are_timed(monkeypatch, error, reason):
    def full(*args, **kwargs):
        raise error("no room\nin a capture")

    monkeypatch.setattr(baselines, "args_replicated", full)
    told = []
    names = ("ours", "args_replicated", "unguided")
    result = run_bench(**{**TINY, "repeats": 1}, methods=names, progress=told.append)
    assert result["left_out"] == {"args_replicated": reason}
    assert list(methods(result)) == ["ours", "unguided"]
    assert methods(result)["ours"]["reference"] == "ours"
    assert f"args_replicated is left out: {reason}" in told
    with pytest.raises(RGTGError, match=r"every method failed on cpu \(args_replicated: "):
        run_bench(**TINY, methods=("args_replicated",))


def test_a_method_may_run_out_of_memory_in_a_timed_run(monkeypatch):
    calls = []

    def later(lm, prompts, *, new_tokens):
        calls.append(new_tokens)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return unguided(lm, prompts, new_tokens=new_tokens)

    unguided = baselines.unguided
    monkeypatch.setattr(baselines, "unguided", later)
    result = run_bench(**TINY, methods=("ours", "unguided"))
    assert (list(result["left_out"]), list(methods(result))) == (["unguided"], ["ours"])
    assert methods(result)["ours"]["runs"] == 2


def test_each_method_is_reported_when_it_is_done_and_has_been_compared(monkeypatch):
    """What a run that is killed has measured is not lost: fewer repeats are done earlier."""
    told, events = [], []

    def each(result):
        (row,) = result["methods"]
        told.append(row)
        events.append(row["method"])

    plan = TimedMethod.plan

    def shorter(self, *given):
        plan(self, *given)
        self.repeats = 1 if self.name == "args_replicated" else 2

    monkeypatch.setattr(TimedMethod, "plan", shorter)
    names = ("ours", "args_replicated", "unguided")
    result = run_bench(**TINY, methods=names, each=each, progress=events.append)
    runs = [event.removeprefix("run ") for event in events if not event.startswith(("warm-up", "loading"))]
    assert runs == [
        "1 of 2: ours",
        "1 of 1: args_replicated",
        "args_replicated",
        "1 of 2: unguided",
        "2 of 2: ours",
        "ours",
        "2 of 2: unguided",
        "unguided",
    ]
    assert sorted(told, key=lambda row: names.index(row["method"])) == result["methods"]
    assert {row["reference"] for row in told} == {"args_replicated", None}


def rounds_of(monkeypatch, device):
    """Names and tokens of the warm-up's runs on a device."""
    asked = []
    if device == "cuda":
        Counters(monkeypatch)

    def entry(name, seconds):
        durations = iter(seconds)

        def call(prompts, tokens):
            asked.append((name, tokens))
            return BaselineRun([[7] * tokens], next(durations), {"prefill": 0.0})

        return TimedMethod(METHODS[name], call, "", torch.device(device), rows=1)

    # the first run takes a minute, for compiling; the second a tenth of a second
    entries = [entry("ours", (60, 0.1)), entry("args_replicated", (60, 0.1))]
    isolated = Isolation(torch.device(device), lambda line: None)
    job = {"prompt_length": 1, "k": 1, "batch": 1, "new_tokens": 64, "repeats": 3, "seconds_per_run": 10.0}
    names = ("ours", "args_replicated")
    named = {"lm": None, "rm": None, "shape": "tiny", "dtype": "float32", "seed": 0, "beta": 1.0}
    run.warm_up(entries, isolated, [[1]], BenchSettings(**named, **job, methods=names))
    return asked, entries


def test_what_compiling_took_does_not_shorten_the_runs_on_a_gpu(monkeypatch):
    asked, entries = rounds_of(monkeypatch, "cuda")
    assert asked == [("ours", 64), ("ours", 8), ("args_replicated", 2), ("args_replicated", 2)]
    assert [(entry.tokens, entry.repeats) for entry in entries] == [(64, 3), (64, 3)]


class Late:
    """A decoder whose prefill takes a second of the device's time and a step a tenth, all launched at once."""

    def __init__(self, clock):
        self.clock = clock

    def generate(self, prompts, max_new_tokens, guidance):
        self.clock[0] += 1.0 + 0.1 * max_new_tokens
        phases = {"prefill": 0.002, "step": 0.003, "host": 0.99 + 0.1 * max_new_tokens}
        stats = SimpleNamespace(phases=phases, first_token_seconds=1.1, cache_bytes={})
        row = SimpleNamespace(tokens=[0] * max_new_tokens)
        return type("Result", (list,), {"stats": stats})([row] * len(prompts))


@pytest.mark.parametrize(("device", "prefill"), [("cuda", 1.0), ("cpu", 0.002)])
def test_on_a_gpu_the_prefill_lasts_until_the_device_has_done_it(monkeypatch, device, prefill):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    run = timing.run_ours(Late(clock), None, [[1], [2]], 64, torch.device(device))
    assert run.seconds == pytest.approx(7.4)
    assert run.phases["prefill"] == pytest.approx(prefill)
    assert sum(run.phases.values()) == pytest.approx(7.4)


def test_a_cpu_warms_up_once(monkeypatch):
    asked, entries = rounds_of(monkeypatch, "cpu")
    assert asked == [("ours", 8), ("args_replicated", 2)]
    assert [entry.tokens for entry in entries] == [8, 2]


def test_only_an_adapter_is_shared(tmp_path):
    with pytest.raises(RGTGError, match="is not an adapter folder, which two_models needs"):
        models.find_adapter(str(tmp_path), None, [METHODS["ours"], METHODS["two_models"]], 0)


def test_copied_sources_are_told_their_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "memory_bandwidth", lambda device: 1e9)
    monkeypatch.setenv("RGTG_COMMIT", "abc123")
    about = roofline.machine()
    assert about["commit"] == "abc123"
    assert about["gpu"] is about["driver"] is None
    assert (about["isa"], about["peer_isa"]) == (instruction_set(), "bf16 some; fp32 some")
    monkeypatch.setenv("RGTG_COMMIT", "")
    assert roofline.machine()["commit"] != ""
