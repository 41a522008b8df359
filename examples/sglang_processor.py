"""SGLang: a custom logit processor that guides its requests with a reward model.

Serve:  PYTHONPATH=examples RGTG_FAST_LM=LM RGTG_FAST_REWARD=RM python -m sglang.launch_server --model-path LM \
            --enable-custom-logit-processor --disable-overlap-schedule --chunked-prefill-size -1
Ask:    POST /generate {"text": "...", "custom_logit_processor": GuideProcessor.to_str(), "sampling_params":
            {"temperature": 0, "custom_params": {"rgtg_beta": 1.5, "rgtg_k": 10}}}

Tried: the class with a stand-in for SGLang's base class and requests, written after the source of SGLang 0.5.23; tokens
equal to RewardGuidedDecoder's. Not tried: a server, a GPU, tensor parallelism, speculative decoding. The scheduler must
not run ahead (--disable-overlap-schedule), since the processor reads each request's tokens from the request. An error,
such as a reward that is NaN, ends the server: SGLang has no way to end one request from here.
"""

import functools
import os
from collections import OrderedDict
from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from rgtg_fast import Guidance, RequestScorer, RGTGError

# At least as many as the server decodes at once (--max-running-requests).
MAX_REQUESTS = int(os.environ.get("RGTG_FAST_MAX_REQUESTS", "32"))


class Requests:
    """The server's requests in a scorer.

    SGLang does not tell when a request has ended: the request that was not seen for longest makes room.

    Args:
        scorer: for at least as many requests as a batch has.
    """

    def __init__(self, scorer: RequestScorer):
        self.scorer = scorer
        # A request's id -> its handle, and the number of its tokens that were decided when it was last seen.
        self.known: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def handles(self, requests: list[Any]) -> list[int]:
        """Handles of a batch's requests, each told its tokens.

        Raises:
            RGTGError: a request has no new token since its last turn.
        """
        present = {request.rid for request in requests}
        for name in [name for name in self.known if name not in present]:
            if len(self.known) + sum(rid not in self.known for rid in present) <= self.scorer.max_requests:
                break
            self.scorer.drop(self.known.pop(name)[0])
        found = []
        for request in requests:
            answer = list(request.output_ids)
            handle, seen = self.known.pop(request.rid, (None, -1))
            if handle is None:
                handle = self.scorer.add(list(request.origin_input_ids), answer)
            elif len(answer) <= seen:
                raise RGTGError(
                    f"request {request.rid} has no new token: start the server with --disable-overlap-schedule and "
                    "--chunked-prefill-size -1"
                )
            self.scorer.advance(handle, answer)
            self.known[request.rid] = handle, len(answer)
            found.append(handle)
        return found


@functools.lru_cache(maxsize=1)
def requests_of_server() -> Requests:
    """One per process: SGLang makes a new processor with every batch."""
    lm, reward = os.environ["RGTG_FAST_LM"], os.environ["RGTG_FAST_REWARD"]
    return Requests(RequestScorer.from_pretrained(lm, reward, max_requests=MAX_REQUESTS))


class GuideProcessor(CustomLogitProcessor):
    """log π + β·r on the k most probable tokens, before the temperature: SGLang then samples from that."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any] | None] | None = None
    ) -> torch.Tensor:
        """Logits [rows, V'] with those of the rows that have parameters guided."""
        guided = [row for row, given in enumerate(custom_param_list or []) if given and "__req__" in given]
        if not guided:
            return logits
        given = [(custom_param_list or [])[row] or {} for row in guided]
        handles = requests_of_server().handles([each["__req__"] for each in given])
        settings = [
            Guidance(k=each.get("rgtg_k", 10), beta=each.get("rgtg_beta", 1.0), temperature=0)
            for each in given
        ]
        scores = requests_of_server().scorer.guide(handles, logits[guided], settings)
        logits[guided] = scores.to(logits.dtype)
        return logits
