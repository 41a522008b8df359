"""Settings of a guided server: files, variables, and what a request may change."""

from pathlib import Path
from typing import Any

import pytest

from rgtg_fast import Guidance, RGTGError
from rgtg_fast.integrations.settings import CONFIG, REWARD, ServerSettings, check_reward


def test_a_file_and_a_variable_name_the_reward(tmp_path: Path) -> None:
    path = tmp_path / "guide.yaml"
    path.write_text("reward: mixture:0.5*pargs:a+0.5*contrastive\nk: 4\nbeta: 2\nweights: [1, 0]\nlabel: 3\n")
    loaded = ServerSettings.load({CONFIG: str(path)})
    assert loaded.guidance == Guidance(k=4, beta=2.0, weights=(1.0, 0.0))
    assert loaded.label == 3
    path.write_text('{"reward": "contrastive", "support": "all"}')
    assert ServerSettings.load({CONFIG: str(path)}).guidance == Guidance(support="all")
    assert ServerSettings.load({REWARD: "genarm:folder"}) == ServerSettings("genarm:folder")


def test_a_request_changes_its_own_guidance() -> None:
    settings = ServerSettings("contrastive", k=4, beta=2.0)
    assert settings.guidance_of(None) == settings.guidance_of({"theirs": 1}) == Guidance(k=4, beta=2.0)
    asked = {"rgtg_beta": -1, "rgtg_support": "all", "rgtg_gate_entropy": 0.5, "rgtg_weights": [1, 2]}
    expected = Guidance(k=4, beta=-1.0, support="all", gate_entropy=0.5, weights=(1.0, 2.0))
    assert settings.guidance_of(asked) == expected
    assert settings.guidance == Guidance(k=4, beta=2.0)


@pytest.mark.parametrize("value", [0, False, "0", "false", "False", "off"])
def test_a_request_may_be_left_unguided(value: Any) -> None:
    assert ServerSettings("contrastive").guidance_of({"rgtg": value}) is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rgtg": [1]}, r"rgtg=\[1\] is neither true nor false"),
        ({"rgtg": 2}, "rgtg=2 is neither"),
        ({"rgtg_bet": 1}, "'rgtg_bet' is unknown: use rgtg, rgtg_k"),
        ({"rgtg_beta": "1"}, "rgtg_beta='1' is not a number"),
        ({"rgtg_beta": float("nan")}, "rgtg_beta=nan is not finite"),
        ({"rgtg_k": True}, "rgtg_k=True is not a whole number"),
        ({"rgtg_k": 101}, "rgtg_k=101 is above 100"),
        ({"rgtg_weights": ["a"]}, r"rgtg_weights\[0\]='a' is not a number"),
        ({"rgtg": 0, "rgtg_k": 0}, "rgtg_k=0 is below 1"),
    ],
)
def test_bad_values_of_a_request(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RGTGError, match=message):
        ServerSettings("contrastive").guidance_of(asked)


@pytest.mark.parametrize(
    ("environ", "text", "message"),
    [
        ({}, None, f"no reward is named: set {REWARD}"),
        ({REWARD: "a", CONFIG: "b"}, None, "are both set"),
        ({CONFIG: "/no/such/file"}, None, "cannot read RGTG_FAST_CONFIG=/no/such/file: No such file"),
        (None, "- a", "names no reward"),
        (None, "reward: a\nnothing: 1", "'nothing' is unknown: use reward, lm, k"),
        (None, "reward: [a]", "is not a name"),
        (None, "reward: a\nbeta: .inf", "beta=inf is not finite"),
        (None, "reward: a\ntrust_remote_code: 1", "trust_remote_code=1 is neither"),
        (None, "reward: a\nlabel: 1.5", "label=1.5 is not a label"),
        (None, "reward: a\nmax_requests: 0", "max_requests=0 is not a whole number >= 1"),
        (None, "reward: 'a", "is neither YAML nor JSON"),
    ],
)
def test_bad_files_and_variables(
    environ: dict[str, str] | None, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "guide.yaml").write_text(text)
        environ = {CONFIG: str(tmp_path / "guide.yaml")}
    with pytest.raises(RGTGError, match=message) as error:
        ServerSettings.load(environ or {})
    assert "\n" not in str(error.value)


def test_guidance_that_the_reward_cannot_give() -> None:
    check_reward(Guidance(support="all"), ServerSettings("genarm:folder").named_reward())
    mixture = ServerSettings("mixture:0.5*pargs:a+0.5*contrastive").named_reward()
    check_reward(Guidance(weights=(1.0, 2.0)), mixture)
    with pytest.raises(RGTGError, match="needs a reward over the whole vocabulary"):
        check_reward(Guidance(support="combined"), ServerSettings("folder").named_reward())
    with pytest.raises(RGTGError, match="1 weights are given and this server's MixtureReward mixes 2"):
        check_reward(Guidance(weights=(1.0,)), mixture)
