"""The model `rgtg` of lm-evaluation-harness: generation tasks, guided by a reward.

Importing this module registers it. `python -m rgtg_fast.integrations.lm_eval` is the harness's own command line with
the model registered, for versions of the harness that find no models of other packages (up to 0.4.13).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import torch
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from rgtg_fast.config import Guidance, number, whole
from rgtg_fast.decoder import RewardGuidedDecoder
from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.models.prompts import Prompt, PromptLike, rendered, text_ids
from rgtg_fast.rewards import MixtureReward, TextReward

logger = logging.getLogger(__name__)

# Names that tasks use for the length of an answer, the first one that is given counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Options of a task that change nothing where they have one of these values, and those that only concern sampling.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "use_cache": (True, False),
}
_OF_SAMPLING = ("top_p", "top_k", "min_p", "typical_p")


class RenderedChat(str):
    """A chat as the text that the harness shows and stores.

    Attributes:
        messages: the chat itself, which a reward may read by another template.
    """

    messages: list[dict[str, Any]]

    def __new__(cls, text: str, messages: Sequence[dict[str, Any]] = ()) -> RenderedChat:
        chat = super().__new__(cls, text)
        chat.messages = list(messages)
        return chat


@dataclass(frozen=True)
class _Settings:
    """What a task asks for.

    Attributes:
        stop: strings that end an answer.
        max_new_tokens: tokens of an answer.
        temperature: 0 is greedy.
    """

    stop: tuple[str, ...]
    max_new_tokens: int
    temperature: float


@register_model("rgtg")
class RewardGuidedLM(TemplateLM):
    """Answers the harness's generation tasks with a `RewardGuidedDecoder`.

    The length, the stop strings and the temperature of an answer are the task's. Request i of a run samples with seed
    `seed` + i, so that the repeats of a document differ. No request changes another's answer; on CUDA products round by
    the number of rows, unless `decoder` was made with `pad_batch` or `batch_invariant`.

    Args:
        lm: path or hub id of the base model, or a (model, tokenizer) pair.
        reward: as in `RewardGuidedDecoder.from_pretrained`; None (`reward=none`) for the base model alone.
        decoder: in place of the two, and of all that concerns loading.
        k: candidates per token.
        beta: weight of the reward.
        support: as in `Guidance`.
        weights: as in `Guidance`.
        gate_entropy: as in `Guidance`.
        seed: of the first request.
        max_gen_toks: tokens of an answer where the task does not say.
        batch_size: rows decoded at once; "auto" is 8.
        max_batch_size: not used; the harness passes it.
        device: as in `from_pretrained`; the harness's default, "cuda:0", is the CPU on a machine without CUDA.
        dtype: as in `from_pretrained`, like the following.
        max_length: tokens of prompt and answer at most.
        engine: what runs the models.
        label: label of the reward model.
        reward_weights: "int8" or "int4" rounds the reward model's weights.
        trust_remote_code: whether code that comes with the models may run.
        unknown: refused by name.

    Raises:
        RGTGError: an argument or model that cannot work, in one line.
    """

    def __init__(
        self,
        lm: Any = None,
        reward: Any = None,
        *,
        decoder: RewardGuidedDecoder | None = None,
        k: int = 10,
        beta: float = 1.0,
        support: str = "lm",
        weights: tuple[float, ...] | None = None,
        gate_entropy: float | None = None,
        seed: int = 0,
        max_gen_toks: int = 256,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        engine: str = "auto",
        label: str | int | None = None,
        reward_weights: str | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise RGTGError(f"the model rgtg has no argument {next(iter(unknown))!r}{_instead(unknown)}")
        self.guidance = Guidance(k, beta, 0.0, support, weights, gate_entropy)
        self.seed = whole("seed", seed, example=0)
        self.max_gen_toks = whole("max_gen_toks", max_gen_toks, 1, 256)
        if (decoder is None) == (lm is None):
            raise RGTGError("the model rgtg needs lm=PATH or, in Python, decoder=...: pass one of them")
        if decoder is None:
            decoder = RewardGuidedDecoder.from_pretrained(
                lm,
                reward=reward,
                device=_device(device),
                dtype=dtype,
                max_batch=8 if batch_size == "auto" else whole("batch_size", batch_size, 1, 8),
                max_length=max_length,
                engine=engine,
                label=label,
                reward_weights=reward_weights,
                trust_remote_code=trust_remote_code,
            )
        elif reward is not None:
            raise RGTGError("reward and decoder, which has a reward of its own: pass one of them")
        if decoder.tokenizer is None:
            raise RGTGError("tasks are text and the decoder's model came without a tokenizer: pass both")
        self.decoder, self.tokenizer = decoder, decoder.tokenizer

    # ---- generation --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to requests whose `args` are (prompt, options).

        Raises:
            RGTGError: an option that decoding has no counterpart of, or a prompt that cannot be answered, with the
                task's name and the document's number, before anything is decoded.
        """
        groups: dict[_Settings, list[int]] = {}
        for index, request in enumerate(requests):
            prompt, options = request.args
            try:
                settings = self._settings(options)
                # A call checks its arguments at once and decodes only when its rows are asked for.
                self._begin([prompt], settings, [0])
            except RGTGError as error:
                where = (
                    f"{request.task_name}, document {request.doc_id}" if request.task_name else "a request"
                )
                raise RGTGError(f"{where}: {str(error).replace('prompt 0 ', 'the prompt ', 1)}") from error
            groups.setdefault(settings, []).append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for settings, indices in groups.items():
                prompts = [requests[index].args[0] for index in indices]
                for at, row in self._begin(prompts, settings, [self.seed + index for index in indices]):
                    index = indices[at]
                    answers[index] = row.text
                    self.cache_hook.add_partial("generate_until", requests[index].args, row.text)
                    bar.update()
        return answers

    def _begin(self, prompts: Sequence[str], settings: _Settings, seeds: list[int]) -> Any:
        return self.decoder.iterate(
            [_as_prompt(prompt) for prompt in prompts],
            max_new_tokens=settings.max_new_tokens,
            guidance=replace(self.guidance, temperature=settings.temperature),
            seed=seeds,
            stop=list(settings.stop),
        )

    def _settings(self, options: Mapping[str, Any]) -> _Settings:
        """A task's options, by the rules of the harness's own models."""
        rest = {name: value for name, value in options.items() if value is not None}
        stop = rest.pop("until", [])
        lengths = [rest.pop(name, None) for name in _LENGTHS]
        length = next((value for value in lengths if value is not None), self.max_gen_toks)
        sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
        if sample not in (None, True, False):
            raise RGTGError(f"do_sample={shown(sample)} is neither true nor false")
        if sample is False or (sample is None and temperature is None):
            temperature = 0.0
        heat = 1.0 if temperature is None else number("temperature", temperature)
        for name, value in rest.items():
            ignored = name in _OF_SAMPLING and heat == 0
            if not ignored and value not in _NEUTRAL.get(name, ()):
                raise RGTGError(
                    f"{name}={shown(value)} has no counterpart in guided decoding: leave it out (until, max_gen_toks, "
                    f"do_sample and temperature are the task's; k={self.guidance.k} and the rest are --model_args)"
                )
        # The harness's models ignore an empty stop string.
        stops = tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text != "")
        return _Settings(stops, whole("max_gen_toks", length, 1, 256), heat)

    # ---- what is refused ---------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> NoReturn:
        """Refused: a log-likelihood would be the base model's."""
        raise RGTGError(
            f"{_tasks(requests)} compares log-likelihoods, which would be those of the unguided base model: use a "
            "generation task (output_type: generate_until), or --model hf for the base model"
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> NoReturn:
        """Refused like `loglikelihood`."""
        self.loglikelihood(requests)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> NoReturn:
        self.loglikelihood([])

    # ---- chats and tokens --------------------------------------------------------------------------------------------

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text; the decoder gets the chat itself.

        Args:
            chat_history: messages.
            add_generation_prompt: whether an answer follows; else the last message is the begun answer.

        Raises:
            RGTGError: a chat that the template refuses, or a begun answer with a reward that reads a chat otherwise
                than the base model does.
        """
        if self.tokenizer.chat_template is None:
            raise RGTGError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template: leave out --apply_chat_template"
            )
        messages = [dict(message) for message in chat_history]
        if add_generation_prompt:
            return RenderedChat(rendered(self.tokenizer, messages, "the chat", answer_follows=True), messages)
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True))
        self._check_begun(messages[:-1])
        return text

    def _check_begun(self, messages: list[dict[str, Any]]) -> None:
        """Refuses the text of a begun answer where the reward does not read the chat by the base model's template."""
        reward = self.decoder.reward
        if reward is None:
            return
        text = rendered(self.tokenizer, messages, "the chat", answer_follows=True)
        parts = reward.rewards if isinstance(reward, MixtureReward) else [reward]
        alike = reward.encode(Prompt(messages)) == reward.encode(Prompt(text))
        if not alike or any(isinstance(part, TextReward) for part in parts):
            raise RGTGError(
                f"the task begins the answer (gen_prefix) and {reward.name} reads a chat otherwise than the base "
                "model: take gen_prefix out of the task, or leave out --apply_chat_template"
            )

    @property
    def tokenizer_name(self) -> str:
        """Identifies requests that the harness stores; other models' requests are plain texts."""
        return "rgtg__" + self.tokenizer.name_or_path.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer at most."""
        return self.decoder.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The token ids of a text."""
        return text_ids(self.tokenizer, string, "the text", special=add_special_tokens is not False)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        guidance = asdict(self.guidance)
        # The task has the temperature.
        del guidance["temperature"]
        return {"rgtg": {**self.decoder.describe(), **guidance, "seed": self.seed}}


def _as_prompt(prompt: str) -> PromptLike:
    return prompt.messages if isinstance(prompt, RenderedChat) and prompt.messages else prompt


def _device(device: str | None) -> str | None:
    if device is not None and str(device).startswith("cuda") and not torch.cuda.is_available():
        logger.warning("device=%s and no CUDA on this machine: the models run on the CPU", device)
        return None
    return device


def _instead(unknown: Mapping[str, Any]) -> str:
    if "pretrained" in unknown:
        return f": use lm={unknown['pretrained']}"
    return ": use lm, reward, k, beta, support, dtype, max_length and others in docs/integrations/lm_eval.md"


def _tasks(requests: Sequence[Any]) -> str:
    names = {request.task_name: None for request in requests if request.task_name}
    return ", ".join(names) or "the task"
