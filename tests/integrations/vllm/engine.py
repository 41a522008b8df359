"""Runs a job on vLLM's engine in this process, where its scorer can be looked at: `python -m ...engine JOB.json`.

The job: `model`, `options` of vLLM's `LLM`, and `requests`, each with `prompt` (ids), `tokens`, `arguments` (or null),
and `cancel` (steps after which it is cancelled, or null). The result: `answers`, and what the test looks at.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from tests.integrations.vllm.support import PROCESSOR


def main(path: Path) -> None:
    job = json.loads(path.read_text(encoding="utf-8"))
    llm = LLM(
        job["model"],
        logits_processors=[PROCESSOR],
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        generation_config="vllm",
        disable_log_stats=False,
        **job["options"],
    )
    engine = llm.llm_engine
    runner = engine.model_executor.driver_worker.worker.model_runner
    (guide,) = [
        each
        for each in runner.input_batch.logitsprocs.non_argmax_invariant
        if type(each).__name__ == "RewardGuideV1"
    ]
    result = decode(engine, job["requests"], guide)
    result["preemptions"] = sum(
        metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"
    )
    (path.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


def decode(engine: Any, requests: list[dict[str, Any]], guide: Any) -> dict[str, Any]:
    """Answers requests that all come at once; some are cancelled on the way."""
    answers: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        params = SamplingParams(
            temperature=0,
            max_tokens=request["tokens"],
            extra_args=request["arguments"],
            detokenize=False,
        )
        engine.add_request(str(number), {"prompt_token_ids": request["prompt"]}, params)
    cancelled = {str(number) for number, request in enumerate(requests) if request["cancel"] is not None}
    most, step = 0, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished and output.request_id not in cancelled:
                answers[output.request_id] = list(output.outputs[0].token_ids)
        most, step = max(most, len(guide.scorer)), step + 1
        gone = [str(number) for number, request in enumerate(requests) if request["cancel"] == step]
        if gone:
            engine.abort_request(gone)
    # The engine tells what has ended with its next step.
    engine.step()
    return {
        "answers": [answers.get(str(number)) for number in range(len(requests))],
        "left": len(guide.scorer),
        "rows": len(guide._rows),
        "most": most,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
