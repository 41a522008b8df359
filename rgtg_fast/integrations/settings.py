"""Settings of a guided server: a reward and defaults from a file or a variable, and what a request may change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgtg_fast.config import Guidance, as_weights, whole
from rgtg_fast.errors import RGTGError, one_line, shown

if TYPE_CHECKING:
    from rgtg_fast.rewards import Reward

CONFIG, REWARD = "RGTG_FAST_CONFIG", "RGTG_FAST_REWARD"
# What a request may set, `rgtg_<name>`, and `rgtg` itself.
PER_REQUEST = ("k", "beta", "support", "weights", "gate_entropy")
OFF, ON = (False, 0, "0", "false", "no", "off"), (True, 1, "1", "true", "yes", "on")


@dataclass(frozen=True)
class ServerSettings:
    """What a guided server loads, and the guidance of a request that sets nothing.

    Args:
        reward: what `--reward` takes: a path, a hub id, `genarm:PATH`, `contrastive`, `bundled:pargs` ...
        lm: base model whose tokens are scored; None for the model that the server serves.
        k: as in `Guidance`.
        beta: as in `Guidance`.
        support: as in `Guidance`.
        weights: as in `Guidance`.
        gate_entropy: as in `Guidance`.
        max_k: largest k that a request may ask for, since all candidates of a step are scored in one forward.
        dtype: dtype of the reward model; None for the server's.
        device: device of the reward model; None for the server's.
        max_requests: requests that are scored at once; None for as many as the server runs at once.
        label: as in `RewardGuidedDecoder.from_pretrained`.
        reward_weights: as in `RewardGuidedDecoder.from_pretrained`.
        trust_remote_code: as in `RewardGuidedDecoder.from_pretrained`.

    Raises:
        RGTGError: a value out of its range.

    Example:
        >>> settings = ServerSettings("bundled:pargs", beta=2.0)
        >>> settings.guidance_of({"rgtg_k": 4})
        Guidance(k=4, beta=2.0, temperature=1.0, support='lm', weights=None, gate_entropy=None)
    """

    reward: str
    lm: str | None = None
    k: int = 10
    beta: float = 1.0
    support: str = "lm"
    weights: tuple[float, ...] | None = None
    gate_entropy: float | None = None
    max_k: int = 100
    dtype: str | None = None
    device: str | None = None
    max_requests: int | None = None
    label: str | int | None = None
    reward_weights: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("reward", "lm", "dtype", "device", "reward_weights"):
            value = getattr(self, name)
            if (value is not None or name == "reward") and (not isinstance(value, str) or not value.strip()):
                raise RGTGError(f"{name}={shown(value)} is not a name: use for example reward=bundled:pargs")
        if not isinstance(self.trust_remote_code, bool):
            raise RGTGError(
                f"trust_remote_code={shown(self.trust_remote_code)} is neither true nor false: use one"
            )
        if self.label is not None and (
            isinstance(self.label, bool) or not isinstance(self.label, (str, int))
        ):
            raise RGTGError(f"label={shown(self.label)} is not a label: use its name or number")
        if self.weights is not None:
            object.__setattr__(self, "weights", as_weights(self.weights))
        if self.max_requests is not None:
            object.__setattr__(self, "max_requests", whole("max_requests", self.max_requests, 1, 8))
        object.__setattr__(self, "max_k", whole("max_k", self.max_k, 1, 100))
        if self.guidance.k > self.max_k:
            raise RGTGError(f"k={self.k} is above max_k={self.max_k}: raise max_k, or use a smaller k")

    @property
    def guidance(self) -> Guidance:
        """The guidance of a request that sets nothing; the server's sampler divides by the temperature."""
        return Guidance(**{name: getattr(self, name) for name in PER_REQUEST})

    def guidance_of(self, arguments: Mapping[str, Any] | None) -> Guidance | None:
        """The guidance of a request, None where it is to be left unguided.

        Args:
            arguments: of the request (`vllm_xargs`, `extra_args`): `rgtg` (false: unguided), `rgtg_k`, `rgtg_beta`,
                `rgtg_support`, `rgtg_weights`, `rgtg_gate_entropy`; those of others are ignored.

        Raises:
            RGTGError: an unknown name that begins with `rgtg`, or a bad value.
        """
        given = {name: value for name, value in (arguments or {}).items() if name.startswith("rgtg")}
        asked = given.pop("rgtg", True)
        changes = {}
        for name, value in given.items():
            field = name.removeprefix("rgtg_")
            if field not in PER_REQUEST:
                names = ", ".join(["rgtg", *(f"rgtg_{each}" for each in PER_REQUEST)])
                raise RGTGError(f"{shown(name)} is unknown: use {names}")
            changes[field] = value
        try:
            guidance = replace(self.guidance, **changes)
        except RGTGError as error:
            # Every message of `Guidance` begins with the name of the field.
            raise RGTGError(f"rgtg_{error}") from error
        if guidance.k > self.max_k:
            raise RGTGError(
                f"rgtg_k={guidance.k} is above {self.max_k}, the most that this server scores: use a smaller one"
            )
        state = asked.lower() if isinstance(asked, str) else asked
        if state not in OFF and state not in ON:
            raise RGTGError(f"rgtg={shown(asked)} is neither true nor false: use rgtg=0 for no guidance")
        return guidance if state in ON else None

    def named_reward(self) -> Reward:
        """The reward before it is bound: its class and its number of parts are known, and no weights are read.

        Raises:
            RGTGError: a name that cannot be read.
        """
        from rgtg_fast.rewards import named_guide

        return named_guide(self.reward, self.label, self.trust_remote_code, self.reward_weights)

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> ServerSettings:
        """Reads the settings that the environment names.

        Args:
            environ: `RGTG_FAST_CONFIG`, the path of a YAML or JSON file whose keys are the fields of this class; or
                `RGTG_FAST_REWARD`, the reward alone.

        Raises:
            RGTGError: neither or both are set, or the file or a value cannot be used.

        Example:
            >>> ServerSettings.load({"RGTG_FAST_REWARD": "contrastive"}).k
            10
        """
        path, reward = environ.get(CONFIG, "").strip(), environ.get(REWARD, "").strip()
        if path and reward:
            raise RGTGError(
                f"{CONFIG}={path} and {REWARD}={reward} are both set: use one, `reward` is a key of the file"
            )
        if not path and not reward:
            raise RGTGError(
                f"no reward is named: set {REWARD} to one such as bundled:pargs, or {CONFIG} to a file of settings"
            )
        if not path:
            return cls(reward)
        return cls(**_read(Path(path), [field.name for field in fields(cls)]))


def check_reward(guidance: Guidance, reward: Reward) -> None:
    """Refuses guidance that a reward cannot give.

    Args:
        guidance: of a request.
        reward: the server's; it need not be loaded.

    Raises:
        RGTGError: a support over a vocabulary that the reward does not score, or weights for other rewards.
    """
    kind = type(reward).__name__
    if guidance.support != "lm" and not reward.scores_vocabulary:
        raise RGTGError(
            f"support={guidance.support!r} needs a reward over the whole vocabulary and this server has a {kind}: "
            "use 'lm'"
        )
    if guidance.weights is not None and len(guidance.weights) != reward.parts:
        raise RGTGError(
            f"{len(guidance.weights)} weights are given and this server's {kind} mixes {reward.parts} rewards: "
            "pass one for each reward of a mixture"
        )


def _read(path: Path, known: list[str]) -> dict[str, Any]:
    """The settings in a file, by name."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RGTGError(f"cannot read {CONFIG}={path}: {reason}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RGTGError(f"{CONFIG}={path} is neither YAML nor JSON: {one_line(error)}") from error
    if not isinstance(values, dict) or "reward" not in values:
        raise RGTGError(f"{CONFIG}={path} names no reward: write for example `reward: bundled:pargs`")
    for name in values:
        if name not in known:
            raise RGTGError(f"{CONFIG}={path}: {shown(name)} is unknown: use {', '.join(known)}")
    return values
