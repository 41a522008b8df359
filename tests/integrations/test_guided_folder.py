"""Guided folders: what `rgtg-fast export` writes decodes under transformers as `RewardGuidedDecoder` does."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from transformers.generation import GenerationMode

from rgtg_fast import Guidance, RewardGuidedDecoder, RGTGError
from rgtg_fast.integrations import guided_folder
from tests.cli.support import HANGS, Outcome, Run, runner
from tests.models.adapters import write_adapter
from tests.models.kinds.tiny import language_model, reward_model, save

PROMPTS = ["abc", "The best way", "x"]
NEW = 12


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base model and reward models: of two kinds, and an adapter."""
    folder = tmp_path_factory.mktemp("models")
    lm = language_model("llama")
    lm.generation_config = GenerationConfig(
        eos_token_id=2, pad_token_id=0, bos_token_id=1, do_sample=True, temperature=0.6, top_p=0.9
    )
    return {
        "lm": save(lm, folder / "lm"),
        "full": save(reward_model("llama"), folder / "rm"),
        "genarm": "genarm:" + save(language_model("llama", seed=5), folder / "genarm"),
        "adapter": str(write_adapter(folder / "adapter", lm)),
    }


@pytest.fixture
def folder(run: Run, models: dict[str, str], tmp_path: Path, own_folders: Path) -> str:
    """A guided folder with a full reward model; greedy."""
    target = tmp_path / "guided"
    done = export(run, models, "full", target, "--k", 6, "--beta", 3, "--temperature", 0)
    assert done.code == 0, done.err
    return str(target)


def export(run: Run, models: dict[str, str], reward: str, target: Path, *options: object) -> Outcome:
    name = models.get(reward, reward)
    return run("export", "--lm", models["lm"], "--reward", name, "--output", target, *options)


def batch(folder: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return dict(tokenizer(PROMPTS, return_tensors="pt", padding=True))


def decoded(models: dict[str, str], reward: str, guidance: Guidance, seed: int = 0) -> list[list[int]]:
    """The decoder's answers, with what ends them."""
    decoder = RewardGuidedDecoder.from_pretrained(models["lm"], models.get(reward, reward))
    rows = decoder.generate(PROMPTS, max_new_tokens=NEW, guidance=guidance, seed=seed)
    return [row.tokens + ([] if row.end_token is None else [row.end_token]) for row in rows]


def answers(sequences: torch.Tensor, width: int) -> list[list[int]]:
    rows = sequences[:, width:].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


@pytest.mark.parametrize(
    ("reward", "options", "guidance"),
    [
        ("full", ["--k", 6, "--beta", 3], Guidance(k=6, beta=3.0)),
        ("adapter", ["--k", 6, "--beta", 3], Guidance(k=6, beta=3.0)),
        ("genarm", ["--support", "all", "--beta", 0.5], Guidance(beta=0.5, support="all")),
        pytest.param(
            "contrastive",
            ["--support", "combined"],
            Guidance(support="combined"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "mixture:0.7*pargs:FULL+0.3*contrastive", ["--k", 5], Guidance(k=5), marks=pytest.mark.slow
        ),
    ],
    ids=["full", "adapter", "genarm", "contrastive", "mixture"],
)
def test_tokens_equal_the_decoders(
    run: Run,
    models: dict[str, str],
    tmp_path: Path,
    own_folders: Path,
    reward: str,
    options: list[object],
    guidance: Guidance,
) -> None:
    """Greedy and sampled; the folder works after it has moved, and needs neither of the models that it was made of."""
    name = reward.replace("FULL", models["full"])
    made, moved = tmp_path / "made", tmp_path / "moved"
    done = export(run, models, name, made, *options, "--temperature", 1)
    assert done.code == 0, done.err
    assert "top_p=0.9" in done.err  # which has no part in guided decoding
    made.rename(moved)
    model = AutoModelForCausalLM.from_pretrained(moved, trust_remote_code=True)
    inputs = batch(str(moved))
    width = inputs["input_ids"].shape[1]
    for sampling, temperature in (({}, 1.0), ({"do_sample": False}, 0.0)):
        found = model.generate(**inputs, max_new_tokens=NEW, seed=4, **sampling)
        asked = Guidance(guidance.k, guidance.beta, temperature, guidance.support)
        assert answers(found, width) == decoded(models, name, asked, 4)


def test_all_ways_of_calling_it(folder: str, models: dict[str, str]) -> None:
    """Loaded with trust, by position; without trust, unguided, unless the call names the folder; in a pipeline."""
    inputs = batch(folder)
    width = inputs["input_ids"].shape[1]
    want = decoded(models, "full", Guidance(k=6, beta=3.0, temperature=0))
    trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    mask = {"attention_mask": inputs["attention_mask"]}
    assert answers(trusted.generate(inputs["input_ids"], **mask, max_new_tokens=NEW), width) == want
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert answers(plain.generate(**inputs, max_new_tokens=NEW), width) != want
    base = AutoModelForCausalLM.from_pretrained(models["lm"])
    for model in (plain, base):
        call = {"custom_generate": folder, "trust_remote_code": True, "do_sample": False}
        assert answers(model.generate(**inputs, **call, max_new_tokens=NEW), width) == want
    pipe = pipeline("text-generation", folder, trust_remote_code=True)
    found = pipe(PROMPTS[1], max_new_tokens=NEW, do_sample=False, return_full_text=False)[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert found["generated_text"] == tokenizer.decode(want[1], skip_special_tokens=True)


def test_a_call_may_change_the_guidance_and_stop(folder: str, models: dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    guidance = Guidance(k=4, beta=-3.0)
    found = model.generate(ids, max_new_tokens=NEW, guidance=guidance)
    want = decoded(models, "full", Guidance(k=4, beta=-3.0, temperature=0))[0]
    assert answers(found, ids.shape[1]) == [want]
    stop = tokenizer.decode(want[3])
    stopped = model.generate(
        ids, max_new_tokens=NEW, guidance=guidance, stop_strings=[stop], tokenizer=tokenizer
    )
    assert stopped[0, ids.shape[1] :].tolist() == want[: want.index(want[3]) + 1]
    with pytest.raises(RGTGError, match="cache_implementation='paged'"):
        model.generate(ids, max_new_tokens=NEW, cache_implementation="paged")


def test_settings_are_read_at_every_call(folder: str, models: dict[str, str]) -> None:
    """An edited file counts at once, and each mistake in it is one line that names the file."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = batch(folder)
    width = inputs["input_ids"].shape[1]
    path = Path(folder) / "guidance.json"
    given = json.loads(path.read_text())
    for beta in (3.0, -3.0):
        path.write_text(json.dumps({**given, "beta": beta}))
        want = decoded(models, "full", Guidance(k=6, beta=beta, temperature=0))
        assert answers(model.generate(**inputs, max_new_tokens=NEW), width) == want
    mistakes = {
        '{"beta"': r"cannot read .*guidance.json",
        "[]": r"guidance.json holds \[\]",
        json.dumps({**given, "beta": "much"}): r"guidance.json: beta='much' is not a number",
        json.dumps({**given, "k": 0}): r"guidance.json: k=0 is below 1",
        json.dumps({**given, "gamma": 1}): r"guidance.json has an unknown setting 'gamma'",
        json.dumps({**given, "trust_remote_code": "no"}): r"guidance.json: trust_remote_code='no' is neither",
        json.dumps({**given, "reward": 3}): r"guidance.json: reward=3 is not a name",
        json.dumps({**given, "rgtg_fast": "99.0.0"}): r"was exported by rgtg_fast 99.0.0 .* upgrade",
        json.dumps({**given, "rgtg_fast": ""}): r"does not say which version",
    }
    for text, message in mistakes.items():
        path.write_text(text)
        with pytest.raises(RGTGError, match=message) as error:
            model.generate(**inputs, max_new_tokens=NEW)
        assert "\n" not in str(error.value)
    path.write_text(json.dumps(given))
    with pytest.raises(RGTGError, match="guidance=0 is not a Guidance"):
        model.generate(**inputs, max_new_tokens=NEW, guidance=0)
    path.unlink()
    with pytest.raises(RGTGError, match=r"is no guided folder: it has no guidance.json"):
        model.generate(**inputs, max_new_tokens=NEW)


def test_two_folders_in_one_process(run: Run, folder: str, models: dict[str, str], tmp_path: Path) -> None:
    """Folders of the same name with other settings stay apart, and one of a newer version is refused alone."""
    other = tmp_path / "other" / "guided"
    assert export(run, models, "full", other, "--beta", -3, "--temperature", 0).code == 0
    inputs = batch(folder)
    width = inputs["input_ids"].shape[1]
    loaded = [AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True) for path in (folder, other)]
    for model, guidance in zip(loaded, (Guidance(6, 3.0, 0), Guidance(10, -3.0, 0)), strict=True):
        assert answers(model.generate(**inputs, max_new_tokens=NEW), width) == decoded(
            models, "full", guidance
        )
    path = other / "guidance.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rgtg_fast": "99.0.0"}))
    with pytest.raises(RGTGError, match="upgrade rgtg-fast"):
        loaded[1].generate(**inputs, max_new_tokens=NEW)
    want = decoded(models, "full", Guidance(6, 3.0, 0))
    assert answers(loaded[0].generate(**inputs, max_new_tokens=NEW), width) == want


def test_a_missing_reward_model_is_one_line(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    (Path(folder) / "reward").rename(Path(folder) / "elsewhere")
    with pytest.raises(RGTGError, match=r"the reward model's folder .*reward is missing"):
        model.generate(**batch(folder), max_new_tokens=NEW)


def test_folders_are_complete_or_absent(
    run: Run, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "guided"

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("rgtg_fast.integrations.guided_folder._card", full)
        assert "No space left on device" in export(run, models, "full", target).error
    assert list(tmp_path.iterdir()) == []
    assert export(run, models, "full", target).code == 0
    before = (target / "guidance.json").read_text()
    assert (
        "exists: name another folder, or replace it with --overwrite"
        in export(run, models, "full", target).error
    )
    with monkeypatch.context() as patched:
        patched.setattr("rgtg_fast.integrations.guided_folder._card", full)
        assert "No space left" in export(run, models, "full", target, "--overwrite").error
    assert (target / "guidance.json").read_text() == before
    done = export(run, models, "contrastive", target, "--overwrite", "--json")
    assert done.rows == [{"output": str(target), "left_out": ["top_p=0.9"]}]
    assert not (target / "reward").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["guided"]


def test_what_an_export_refuses(run: Run, models: dict[str, str], tmp_path: Path) -> None:
    """Nothing but a guided folder is replaced, no model that is read, and no adapter whose base would be missing."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("mine")
    assert "is not a guided folder" in export(run, models, "full", mine, "--overwrite").error
    assert "it is a file" in export(run, models, "full", mine / "letter.txt").error
    assert "leaves nothing to export" in export(run, models, "none", tmp_path / "new").error
    assert "k=0 is below 1" in export(run, models, "full", tmp_path / "new", "--k", 0).error
    assert (
        "needs a reward over the whole vocabulary"
        in export(run, models, "full", tmp_path / "new", "--support", "all").error
    )
    stranger = write_adapter(tmp_path / "stranger", language_model("llama", seed=8))
    config = stranger / "adapter_config.json"
    base = save(language_model("llama", seed=8), tmp_path / "base")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    assert "is an adapter of another base model" in export(run, models, str(stranger), tmp_path / "new").error
    guided = tmp_path / "guided"
    assert export(run, models, "full", guided).code == 0
    again = run("export", "--lm", guided, "--reward", "contrastive", "--output", guided, "--overwrite")
    assert "holds the model that is read" in again.error
    assert (mine / "letter.txt").read_text() == "mine"
    assert not (tmp_path / "new").exists()
    link = tmp_path / "link"
    link.symlink_to(guided)
    assert "symbolic link" in export(run, models, "full", link, "--overwrite").error


@pytest.mark.parametrize(
    "settings",
    [
        {"dola_layers": "low"},
        {"constraints": [1]},
        {"force_words_ids": [[5]]},
        {"assistant_early_exit": 1},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4},
    ],
)
def test_other_ways_of_decoding_are_left_out(settings: dict[str, Any], tmp_path: Path) -> None:
    """Every call of such a folder would be refused."""
    lm = language_model("llama")
    for name, value in settings.items():
        setattr(lm.generation_config, name, value)
    decoder = RewardGuidedDecoder.from_pretrained((lm, None))
    name = next(iter(settings))
    assert guided_folder._write_generation_config(decoder, Guidance(temperature=0), tmp_path) == [
        f"{name}={settings[name]!r}"
    ]
    written = GenerationConfig.from_pretrained(tmp_path)
    assert written.get_generation_mode() == GenerationMode.GREEDY_SEARCH


def test_a_generation_config_that_transformers_does_not_save(tmp_path: Path) -> None:
    lm = language_model("llama")
    lm.generation_config.output_scores = True
    decoder = RewardGuidedDecoder.from_pretrained((lm, None))
    with pytest.raises(RGTGError, match=r"generation config cannot be saved .*output_scores") as error:
        guided_folder._write_generation_config(decoder, Guidance(temperature=0), tmp_path)
    assert "\n" not in str(error.value)


def test_fold_is_passed_on(
    run: Run, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Any, ...]] = []
    module = ModuleType("rgtg_fast.integrations.fold")
    module.export_folded = lambda *args, **settings: given.append((*args, settings))  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "rgtg_fast.integrations.fold", module)
    target = str(tmp_path / "new")
    done = export(run, models, "farma:x", Path(target), "--fold", "--beta", 2)
    assert (done.code, given) == (
        0,
        [(models["lm"], "farma:x", 2.0, target, {"dtype": None, "overwrite": False})],
    )
    assert (
        "needs a reward with a vocabulary head"
        in export(run, models, "contrastive", tmp_path / "new", "--fold").error
    )
    for option in (["--k", 5], ["--temperature", 1], ["--support", "combined"], ["--trust-remote-code"]):
        refused = export(run, models, "farma:x", Path(target), "--fold", *option)
        assert f"{option[0]} has no part in it: leave it out" in refused.error


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_example_of_custom_generate_runs(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With tiny models here, with the embedded one below."""
    monkeypatch.setattr(sys, "argv", ["custom_generate.py", models["lm"], models["full"]])
    runpy.run_path(str(EXAMPLES / "custom_generate.py"))
    out = capsys.readouterr().out
    assert out.startswith("Greedy:\n- ")
    assert "As a stream:\n" in out


def printed(name: str) -> list[str]:
    """The lines that an example prints in a process of its own."""
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.model
def test_the_examples_guide_the_embedded_model(smollm2: Path) -> None:
    lines = printed("custom_generate.py")
    greedy, stream = lines.index("Greedy:"), lines.index("As a stream:")
    assert sum(line.startswith("- ") for line in lines) == 2 + 6
    assert lines[greedy + 1] == "- " + lines[stream + 1]
    folder, *found = printed("export_folder.py")
    assert folder.endswith("guided")
    by_name = dict(line.split(":", 1) for line in "\n".join(found).split("\n") if ":" in line)
    assert by_name["guided"].strip() == by_name["pipeline"].strip() != by_name["unguided"].strip()
