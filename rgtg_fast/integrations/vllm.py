"""vLLM: `vllm serve MODEL --logits-processors rgtg_fast.integrations.vllm:RewardGuide` (docs/integrations/vllm.md)."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from rgtg_fast.errors import RGTGError
from rgtg_fast.integrations.settings import ServerSettings, check_reward
from rgtg_fast.integrations.vllm_start import refuse_beams
from rgtg_fast.rewards import Reward


def _base_classes() -> tuple[type, ...]:
    """What a class must derive from for vLLM to load it: the interfaces of the runners that this version has."""
    found = []
    for module in ("vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor"):
        try:
            found.append(importlib.import_module(module).LogitsProcessor)
        except (ModuleNotFoundError, AttributeError) as error:
            if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("vllm"):
                raise
    if not found:
        raise RGTGError(
            "rgtg_fast.integrations.vllm needs vLLM with logits processors, 0.30 or newer: pip install vllm"
        )
    return tuple(found)


class RewardGuide(*_base_classes()):
    """Adds β·r to the logits of the requests of a vLLM server.

    vLLM's front end loads this class too, for `validate_params` alone: no model is loaded there. In an engine it makes
    the processor of the engine's runner. The reward and the defaults are those of `ServerSettings.load`; a request
    changes them by `vllm_xargs`.
    """

    def __new__(cls, vllm_config: Any, *state: Any) -> Any:
        """The processor of the engine's runner.

        Args:
            vllm_config: the engine's configuration.
            state: the further arguments of the runner's interface: device and pinning (V1), or the requests (V2).

        Raises:
            RGTGError: the settings, the reward model or the server do not fit each other.
        """
        if getattr(vllm_config, "use_v2_model_runner", False):
            from rgtg_fast.integrations.vllm_v2 import RewardGuideV2

            return RewardGuideV2(vllm_config, *state)
        from rgtg_fast.integrations.vllm_v1 import RewardGuideV1

        return RewardGuideV1(vllm_config, *state)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses a request that cannot be guided as it asks.

        Args:
            sampling_params: vLLM's `SamplingParams`.

        Raises:
            RGTGError: a bad value, a support or weights that do not fit the reward, or beam search.
        """
        settings = _settings()
        guidance = settings.guidance_of(sampling_params.extra_args)
        if guidance is None:
            return
        check_reward(guidance, _reward())
        refuse_beams(sampling_params)


@functools.lru_cache(maxsize=1)
def _settings() -> ServerSettings:
    return ServerSettings.load()


@functools.lru_cache(maxsize=1)
def _reward() -> Reward:
    return _settings().named_reward()
