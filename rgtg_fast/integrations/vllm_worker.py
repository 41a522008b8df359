"""vLLM's worker for rewards that are linear in the served model's own states (`vllm_head.py`)."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from rgtg_fast.errors import RGTGError
from rgtg_fast.integrations.vllm_head import HeadRewardGuide, logged

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import (  # pyright: ignore[reportMissingImports]
        CPUWorker as Worker,
    )
else:
    from vllm.v1.worker.gpu_worker import Worker  # pyright: ignore[reportMissingImports]


class RewardWorker(Worker):
    """A worker whose model hands the states that its logits are computed of to `HeadRewardGuide`."""

    def load_model(self, **settings: Any) -> None:
        """Loads the model, and then the reward.

        Raises:
            RGTGError: the server was started without the logits processor.
        """
        super().load_model(**settings)
        # The newer runner (V2) has no such batch, and refuses the processor before this.
        batch = getattr(self.model_runner, "input_batch", None)
        guides = (
            [each for each in batch.logitsprocs.all if isinstance(each, HeadRewardGuide)] if batch else []
        )
        with logged():
            if not guides:
                raise RGTGError(
                    "this worker serves a logits processor: add --logits-processors "
                    "rgtg_fast.integrations.vllm_head:HeadRewardGuide"
                )
            for guide in guides:
                guide.attach(self.model_runner.get_model())
