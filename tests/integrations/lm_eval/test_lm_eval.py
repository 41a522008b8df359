"""lm-evaluation-harness itself with the model `rgtg`, without a network."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: `bash tests/integrations/run lm_eval`")

import lm_eval
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from rgtg_fast import ContrastiveReward, Guidance, RewardGuidedDecoder
from rgtg_fast.errors import RGTGError
from rgtg_fast.integrations.lm_eval import RenderedChat, RewardGuidedLM
from tests.conftest import make_lm, make_rm, make_tokenizer

ROOT = Path(__file__).parents[3]
TASKS = ROOT / "examples" / "lm_eval"
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11"]


def tiny(reward: Any = "sequence", **settings: Any) -> RewardGuidedLM:
    tokenizer = make_tokenizer()
    own = (make_rm(), tokenizer) if reward == "sequence" else reward
    decoder = RewardGuidedDecoder.from_pretrained((make_lm(), tokenizer), reward=own, max_batch=2)
    return RewardGuidedLM(decoder=decoder, **settings)


def requests(prompts: list[str], **options: Any) -> list[Any]:
    return [
        SimpleNamespace(args=(prompt, dict(options)), task_name="words", doc_id=number)
        for number, prompt in enumerate(prompts)
    ]


def test_the_harness_finds_the_model() -> None:
    assert get_model("rgtg") is RewardGuidedLM


def test_answers_are_the_decoders() -> None:
    model = tiny(beta=2.0, k=4)
    found = model.generate_until(requests(PROMPTS, until=["w3"], max_gen_toks=12), disable_tqdm=True)
    wanted = model.decoder.generate(
        PROMPTS, max_new_tokens=12, guidance=Guidance(k=4, beta=2.0, temperature=0), stop="w3"
    )
    assert found == [row.text for row in wanted]
    unguided = tiny(None, k=4).generate_until(requests(PROMPTS, until=["w3"], max_gen_toks=12), True)
    assert unguided != found


def test_each_request_keeps_its_own_options() -> None:
    model = tiny(beta=2.0, k=4)
    mixed = [
        *requests(PROMPTS[:1], until="w3", max_gen_toks=4),
        *requests(PROMPTS[1:2], until=[""], max_new_tokens=9, temperature=0.0, top_p=0.9),
        *requests(PROMPTS[:1] * 2, until=None, max_tokens=6, do_sample=True, temperature=20.0),
        *requests(PROMPTS[2:], do_sample=True, max_gen_toks=6),
        *requests(PROMPTS[2:], do_sample=False, temperature=0.7, max_gen_toks=6),
    ]
    found = model.generate_until(mixed, disable_tqdm=True)
    prompts = [request.args[0] for request in mixed]
    lengths, heats = [4, 9, 6, 6, 6, 6], [0, 0, 20.0, 20.0, 1.0, 0]
    for index, answer in enumerate(found):
        wanted = model.decoder.generate(
            prompts[index],
            max_new_tokens=lengths[index],
            guidance=Guidance(k=4, beta=2.0, temperature=heats[index]),
            seed=index,
            stop=["w3"] if index == 0 else None,
        )
        assert answer == wanted[0].text, index
    assert found[2] != found[3], "repeats of a document have seeds of their own"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"do_sample": True, "top_p": 0.9}, "top_p=0.9"),
        ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"max_gen_toks": 500}, "128"),
        ({"until": [7], "max_gen_toks": 4}, "stop=7"),
        ({"enable_thinking": True}, "enable_thinking=True"),
    ],
)
def test_an_option_without_a_counterpart_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RGTGError) as caught:
        tiny().generate_until(requests(PROMPTS[:1], **options), disable_tqdm=True)
    assert named in str(caught.value)
    assert str(caught.value).startswith("words, document 0: ")


def test_a_prompt_that_is_too_long_is_named_before_anything_is_decoded() -> None:
    model = tiny()
    both = requests(["w1", "w2 " * 200], max_gen_toks=4)
    with pytest.raises(RGTGError, match=r"words, document 1: the prompt has 200 tokens"):
        model.generate_until(both, disable_tqdm=True)


def test_log_likelihoods_are_refused_with_the_reason() -> None:
    for name in ("loglikelihood", "loglikelihood_rolling"):
        with pytest.raises(RGTGError, match=r"words compares log-likelihoods.*unguided.*generate_until"):
            getattr(tiny(), name)(requests(PROMPTS))


def test_a_chat_reaches_the_decoder_as_a_chat() -> None:
    """The contrastive reward reads a chat and the same chat as a text differently."""
    model = tiny(ContrastiveReward("w1", "w2"), beta=2.0)
    chat = [{"role": "user", "content": "w5 w6"}]
    text = model.apply_chat_template(chat)
    assert text == "<user> w5 w6 <assistant>"
    kept = pickle.loads(pickle.dumps(text))
    assert isinstance(kept, RenderedChat)
    assert kept.messages == chat
    (found,) = model.generate_until(requests([kept], max_gen_toks=10), disable_tqdm=True)
    guidance = Guidance(beta=2.0, temperature=0)
    assert found == model.decoder.generate([chat], max_new_tokens=10, guidance=guidance)[0].text
    assert found != model.decoder.generate(str(text), max_new_tokens=10, guidance=guidance)[0].text


def test_a_begun_answer_needs_a_reward_that_reads_what_the_base_model_reads() -> None:
    chat = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w9"}]
    assert str(tiny().apply_chat_template(chat, add_generation_prompt=False)).rstrip().endswith("w9")
    with pytest.raises(RGTGError, match="gen_prefix"):
        tiny(ContrastiveReward("w1", "w2")).apply_chat_template(chat, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("pretrained=some/model", "lm=some/model"),
        ("reward=none", "lm=PATH"),
        ("lm=/nonexistent,reward=none", "nonexistent"),
        ("lm=x,beta=high", "beta='high'"),
        ("lm=x,batch_size=auto:4", "batch_size='auto:4'"),
        ("lm=x,betta=1", "betta"),
    ],
)
def test_bad_model_arguments_are_one_line(arguments: str, named: str) -> None:
    with pytest.raises(RGTGError) as caught:
        get_model("rgtg").create_from_arg_string(arguments)
    assert named in str(caught.value)


def test_a_task_with_chats_runs_in_the_harness(monkeypatch: pytest.MonkeyPatch, smollm2: Path) -> None:
    """The task's own prompts, its filters and its metric; the answers are the decoder's."""
    monkeypatch.chdir(ROOT)
    model = RewardGuidedLM(lm=str(smollm2), reward="bundled:pargs", beta=2.0, batch_size=3)
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=["capitals"],
        task_manager=TaskManager(include_path=str(TASKS)),
        apply_chat_template=True,
        limit=3,
    )
    samples = results["samples"]["capitals"]
    rows = [json.loads(line) for line in (TASKS / "capitals.jsonl").read_text().splitlines()[:3]]
    chats = [[{"role": "user", "content": f"Question: {row['question']}\nAnswer:"}] for row in rows]
    wanted = model.decoder.generate(
        chats, max_new_tokens=16, guidance=Guidance(beta=2.0, temperature=0), stop=["\n", "Question:"]
    )
    assert [sample["resps"][0][0] for sample in samples] == [row.text for row in wanted]
    right = [row["answer"] in answer.text for row, answer in zip(rows, wanted, strict=True)]
    assert results["results"]["capitals"]["exact_match,city"] == pytest.approx(sum(right) / 3)
    assert results["config"]["rgtg"]["beta"] == 2.0


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_command_of_the_documentation(smollm2: Path, tmp_path: Path) -> None:
    task = ["--tasks", "capitals", "--include_path", "examples/lm_eval", "--limit", "2"]
    models = f"lm={smollm2},reward=bundled:pargs,beta=1.5"
    done = run(
        *("-m", "rgtg_fast.integrations.lm_eval", "run", "--model", "rgtg", "--model_args", models),
        *(*task, "--output_path", str(tmp_path / "results.json")),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exact_match" in done.stdout
    (written,) = tmp_path.rglob("*.json")
    assert json.loads(written.read_text())["config"]["rgtg"]["beta"] == 1.5
    refused = run(
        *(
            "-m",
            "rgtg_fast.integrations.lm_eval",
            "run",
            "--model",
            "rgtg",
            "--model_args",
            "lm=/nowhere",
            *task,
        )
    )
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert refused.stderr.strip().splitlines()[-1].startswith("error: ")


def test_the_example_runs() -> None:
    done = run("examples/lm_eval_guided.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([line for line in done.stdout.splitlines() if line.startswith("beta=")]) == 3
