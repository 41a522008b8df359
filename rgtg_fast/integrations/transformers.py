"""`model.generate(..., custom_generate=rgtg_fast.custom_generate)`: transformers' call, decoded by our engine.

transformers prepares a call (generation config, attention mask, stopping criteria) and leaves the decoding loop to a
callable. Of what it prepares, everything that could change the tokens is either served or refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from rgtg_fast.config import Guidance, whole
from rgtg_fast.decoder import RewardGuidedDecoder, RewardLike
from rgtg_fast.engine.request import Arguments, Run, as_run
from rgtg_fast.errors import RGTGError, shown
from rgtg_fast.integrations.kept_decoder import decoder_for

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from rgtg_fast.engine.batch import Row

# Processors that work on the distribution which is sampled from, or hide a mistake, or run a model of their own: by
# their class, the setting of generate() that adds them and what switches it off.
_REFUSED = {
    "EpsilonLogitsWarper": ("epsilon_cutoff", "0.0"),
    "EtaLogitsWarper": ("eta_cutoff", "0.0"),
    "InfNanRemoveLogitsProcessor": ("remove_invalid_values", "False"),
    "MinPLogitsWarper": ("min_p", "None"),
    "SynthIDTextWatermarkLogitsProcessor": ("watermarking_config", "None"),
    "TopHLogitsWarper": ("top_h", "None"),
    "TopPLogitsWarper": ("top_p", "1.0"),
    "TypicalLogitsWarper": ("typical_p", "1.0"),
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": ("guidance_scale", "None"),
    "WatermarkLogitsProcessor": ("watermarking_config", "None"),
}
# Inputs of a forward that decoding does not depend on, or that are checked on their own.
_INPUTS = {
    "attention_mask",
    "cache",
    "cache_position",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "use_cache",
}
# What generate() can return for each step; all need logits of the whole vocabulary or the model's own forward.
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def custom_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    reward: RewardLike = None,
    guidance: Guidance = Guidance(),
    seed: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    decoder: RewardGuidedDecoder | None = None,
    streamer: BaseStreamer | None = None,
    **inputs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """The decoding loop of `model.generate(..., custom_generate=rgtg_fast.custom_generate, reward=...)`.

    transformers calls it with the first five arguments and `inputs`; `reward`, `guidance`, `seed` and `decoder` are
    arguments of `generate`. A tokenizer does not reach it that way, since transformers keeps it: bind it with
    `functools.partial(rgtg_fast.custom_generate, tokenizer=...)`.

    The tokens are those of `RewardGuidedDecoder.generate` with the temperature of the generation config (0 without
    `do_sample`). The decoder is made at the first call and kept with the model for calls with the same reward.

    Args:
        model: the base model.
        input_ids: [B, P] int64, prompts, padded on either side where an attention mask says so.
        logits_processor: those of the generation config and the caller's.
        stopping_criteria: those of the generation config and the caller's; the latter are called after every step with
            all sequences so far and None for the scores.
        generation_config: of the call.
        reward: as in `RewardGuidedDecoder.from_pretrained`; without one, or a `decoder`, the call is refused.
        guidance: k, β, support and the like; its temperature is generate()'s, so leave it out.
        seed: of every prompt; the j-th of several sequences of a prompt has `seed + j`. None: seeds from torch's
            generator, so that `torch.manual_seed` makes a call repeatable.
        tokenizer: the base model's; by default the one in the folder that the model was loaded from, where there is
            one.
        decoder: used in place of one made here, for a choice of engine or dtype; not together with `reward`.
        streamer: gets the tokens of every step, and its end. One given to `generate` is found in the caller.
        inputs: further inputs of the model's forward that transformers has prepared.

    Returns:
        Sequences [B, P + N], each prompt as given with its answer, padded on the right as generate() does; in a
        `GenerateDecoderOnlyOutput` with `return_dict_in_generate`.

    Raises:
        RGTGError: an argument that cannot be served exactly, in one line.
    """
    caller = _caller()
    _check_call(model, caller, generation_config, input_ids, inputs)
    chosen = _guidance(guidance, generation_config)
    processors = _processors(logits_processor, chosen, generation_config)
    prompts = _prompts(input_ids, inputs.get("attention_mask"), inputs.get("position_ids"))
    seeds = _seeds(seed, len(prompts), generation_config)
    call = _Call(
        input_ids, generation_config, stopping_criteria, processors, streamer, caller.get("streamer")
    )
    with decoder_for(model, reward, tokenizer, decoder, len(prompts)) as used:
        run = _begin(used, prompts, chosen, seeds, call)
        for rows in used._turns.of(run, used._scheduler.steps(run)):
            call.step(rows, run)
    sequences = call.finish()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)  # pyright: ignore[reportArgumentType]
    return sequences


class _Call:
    """What a call of generate() sees of a run: the tokens of every step.

    Args:
        input_ids: [B, P], as given.
        config: the call's generation config.
        criteria: all stopping criteria.
        processors: change the base model's logits before candidates are selected.
        bound: a streamer that was bound to the callable, which has seen nothing yet.
        given: one that was given to generate(), which has the prompt already.

    Attributes:
        eos_ids: tokens that end a sequence.
        process: as in `Run`, None without processors.
        max_new_tokens: tokens after the padded prompts.

    Raises:
        RGTGError: two streamers, or no padding token for sequences of different lengths.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        config: GenerationConfig,
        criteria: StoppingCriteriaList,
        processors: LogitsProcessorList,
        bound: BaseStreamer | None,
        given: BaseStreamer | None,
    ):
        if bound is not None and given is not None and bound is not given:
            raise RGTGError(
                "two streamers, one bound to custom_generate and one given to generate: use one of them"
            )
        self._input_ids, self._columns = input_ids, list[list[int]]()
        self._processors = processors
        self.process = self._process if len(processors) else None
        self._streamer = bound if given is None else given
        if self._streamer is not None and given is None:
            self._streamer.put(input_ids.cpu())
        own = EosTokenCriteria, MaxLengthCriteria
        self._criteria: list[StoppingCriteria] = [each for each in criteria if not isinstance(each, own)]
        ends = [each.eos_token_id for each in criteria if isinstance(each, EosTokenCriteria)]
        self.eos_ids = frozenset(token for ids in ends for token in ids.tolist())
        lengths = [each.max_length for each in criteria if isinstance(each, MaxLengthCriteria)]
        if not lengths:
            raise RGTGError("there is no length limit: pass max_new_tokens")
        # generate() decodes one token before it asks the criteria.
        self.max_new_tokens = max(1, min(lengths) - input_ids.shape[1])
        pad = config._pad_token_tensor
        self._pad = None if pad is None else int(pad)
        if self._pad is None and self._criteria and len(input_ids) > 1:
            raise RGTGError(
                "stopping criteria may end one sequence before another and there is no padding token: pass pad_token_id"
            )

    def step(self, rows: Sequence[Row], run: Run) -> None:
        """Notes the tokens of a step, and ends the rows that a stopping criterion ends.

        Args:
            rows: all rows that had not ended.
            run: the run.
        """
        column = [0 if self._pad is None else self._pad] * len(self._input_ids)
        for row in rows:
            column[row.prompt.index] = row.last_token
        self._columns.append(column)
        if self._criteria:
            sequences, ended = self._sequences(), None
            for criterion in self._criteria:
                answer = criterion(sequences, None)  # pyright: ignore[reportArgumentType]
                done = torch.as_tensor(answer).cpu().bool().expand(len(column))
                ended = done if ended is None else ended | done
            assert ended is not None
            for row in rows:
                if row.finish_reason is None and ended[row.prompt.index]:
                    run.stopping.finish(row, "stop")
        if self._streamer is not None:
            self._streamer.put(torch.tensor(column))

    def _process(self, rows: Sequence[Row], logits: torch.Tensor) -> torch.Tensor:
        """Float32 logits [B', V] of the rows that go on, after the processors, which see all B rows at their places."""
        places = torch.tensor([row.prompt.index for row in rows], device=logits.device)
        whole = torch.zeros(len(self._input_ids), logits.shape[-1], device=logits.device)
        whole[places] = logits[: len(rows)].float()
        done = self._processors(self._sequences().to(logits.device), whole)  # pyright: ignore[reportArgumentType]
        return torch.cat([done[places].float(), logits[len(rows) :].float()])

    def finish(self) -> torch.Tensor:
        """Ends the streamer; all sequences [B, P + N]."""
        if self._streamer is not None:
            self._streamer.end()
        return self._sequences()

    def _sequences(self) -> torch.Tensor:
        # Narrower prompts become int64, as in generate().
        answers = torch.tensor(self._columns, dtype=torch.int64, device=self._input_ids.device)
        return torch.cat([self._input_ids, answers.view(-1, len(self._input_ids)).T], dim=-1)


# ---- what transformers has prepared ----------------------------------------------------------------------------------


def _caller() -> dict[str, Any]:
    """What the calling generate() keeps to itself, by name; empty where another function has called.

    transformers passes a streamer, an assistant model and `synced_gpus` to no callable, though it has given the prompt
    to the streamer and would leave it without an end.
    """
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__")
        if frame.f_code.co_name == "generate" and name == "transformers.generation.utils":
            return {key: frame.f_locals.get(key) for key in ("streamer", "assistant_model", "synced_gpus")}
        frame = frame.f_back
    return {}


def _check_call(
    model: PreTrainedModel,
    caller: dict[str, Any],
    config: GenerationConfig,
    input_ids: torch.Tensor,
    inputs: dict[str, Any],
) -> None:
    """Refuses what our engine does not decode.

    Raises:
        RGTGError: naming the argument of generate().
    """
    if model.config.is_encoder_decoder:
        raise RGTGError(
            f"{type(model).__name__} is an encoder-decoder: custom_generate decodes causal models"
        )
    if input_ids.ndim != 2:
        raise RGTGError(f"input_ids have shape {list(input_ids.shape)}: pass [B, P], one row for each prompt")
    if caller.get("assistant_model") is not None:
        raise RGTGError("assistant_model has no part in guided decoding: leave it out")
    if caller.get("synced_gpus"):
        raise RGTGError(
            "synced_gpus needs transformers' own loop: decode a model that is whole on its device"
        )
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise RGTGError(
            f"the generation config asks for {str(mode.value).replace('_', ' ')} (num_beams={config.num_beams}): "
            "custom_generate decodes greedily or samples, num_beams=1"
        )
    if config.cache_implementation not in (None, "dynamic"):
        raise RGTGError(
            f"cache_implementation={config.cache_implementation!r} chooses a cache of transformers and this decoder "
            "has its own: leave it out"
        )
    asked = [name for name in _OUTPUTS if config.return_dict_in_generate and getattr(config, name)]
    if asked:
        raise RGTGError(f"{asked[0]}=True needs logits of every token: leave it out")
    if inputs.get("inputs_embeds") is not None or not input_ids.shape[1]:
        raise RGTGError("inputs_embeds have no token ids, which rewards read: pass input_ids")
    cache = inputs.get("cache", inputs.get("past_key_values"))
    if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length()):
        raise RGTGError(
            "past_key_values of an earlier call are not read: leave them out and pass the whole input_ids"
        )
    for name, value in inputs.items():
        zero = name == "token_type_ids" and not torch.any(value)
        if name not in _INPUTS and value is not None and value is not False and not zero:
            raise RGTGError(
                f"{name}={shown(value)} is an input that guided decoding does not read: leave it out"
            )


def _guidance(given: Guidance, config: GenerationConfig) -> Guidance:
    """The guidance with the temperature of the generation config.

    Raises:
        RGTGError: another temperature in the guidance.
    """
    if not isinstance(given, Guidance):
        raise RGTGError(f"guidance={shown(given)} is not a Guidance: pass Guidance(k=10, beta=1.0)")
    temperature = 0.0
    if config.do_sample:
        temperature = 1.0 if config.temperature is None else float(config.temperature)
    if given.temperature not in (1.0, temperature):
        asked = f"do_sample=True, temperature={temperature}" if config.do_sample else "do_sample=False"
        raise RGTGError(
            f"Guidance(temperature={given.temperature}) and generate({asked}): set do_sample and temperature in "
            "generate, and leave it out of the guidance"
        )
    return replace(given, temperature=temperature)


def _processors(
    given: LogitsProcessorList, guidance: Guidance, config: GenerationConfig
) -> LogitsProcessorList:
    """The processors that apply to the base model's logits, before candidates are selected.

    Those that generate() puts behind them, at sampling, would apply to the guided distribution. Temperature and a
    top-k that cuts no candidate are part of guided decoding; the others are not.

    Raises:
        RGTGError: one of the others.
    """
    applied = LogitsProcessorList()
    for processor in given:
        name = type(processor).__name__
        if name in _REFUSED:
            setting, off = _REFUSED[name]
            value = getattr(config, setting, None)
            asked, way_out = f"{setting}={shown(value)}", f"pass {setting}={off}"
            if str(value) in ("None", off):  # the caller's own
                asked, way_out = f"logits_processor {name}", "leave it out"
            raise RGTGError(
                f"{asked} changes the guided distribution, which custom_generate samples as it is: {way_out}"
            )
        if isinstance(processor, TemperatureLogitsWarper):
            if processor.temperature != guidance.temperature:
                raise RGTGError(
                    f"{name}({processor.temperature}) beside generate(temperature={guidance.temperature}): set "
                    "do_sample=True and temperature in generate"
                )
        elif isinstance(processor, TopKLogitsWarper):
            if guidance.support == "all" or processor.top_k < guidance.k:
                kept = "support='all'" if guidance.support == "all" else f"k={guidance.k} candidates"
                raise RGTGError(
                    f"top_k={processor.top_k} (transformers' default when sampling is 50) would cut the guidance's "
                    f"{kept}: pass top_k=0"
                )
        elif not isinstance(processor, LogitNormalization):
            applied.append(processor)
    return applied


def _prompts(
    input_ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
) -> list[list[int]]:
    """The token ids of each prompt without its padding.

    Raises:
        RGTGError: an empty prompt, or positions that are not those of its tokens.
    """
    kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.to(input_ids.device) != 0
    if kept.shape != input_ids.shape:
        raise RGTGError(
            f"attention_mask has shape {tuple(kept.shape)} and input_ids {tuple(input_ids.shape)}: pass one mask value "
            "for each id"
        )
    empty = (~kept.any(-1)).nonzero()
    if len(empty):
        raise RGTGError(f"prompt {int(empty[0])} is empty under its attention_mask: pass at least one token")
    if positions is not None:
        expected = kept.cumsum(-1) - 1
        if positions.shape[-1] != input_ids.shape[1] or torch.any((positions != expected) & kept):
            raise RGTGError(
                "position_ids, or those that follow from attention_mask, differ from the places of the tokens: pass a "
                "mask of 0 and 1 for each id, and no position_ids"
            )
    return [ids[row].tolist() for ids, row in zip(input_ids, kept, strict=True)]


def _seeds(seed: int | None, rows: int, config: GenerationConfig) -> list[int]:
    """A seed for each row; rows of one prompt are next to each other."""
    copies = config.num_return_sequences or 1
    if seed is not None:
        first = whole("seed", seed, example=0)
        return [first + row % copies for row in range(rows)]
    return torch.randint(2**62, (rows,)).tolist() if config.do_sample else [0] * rows


def _begin(
    decoder: RewardGuidedDecoder,
    prompts: list[list[int]],
    guidance: Guidance,
    seeds: list[int],
    call: _Call,
) -> Run:
    """A run of all rows, to which the caches belong from now on."""
    with decoder._turns.taken():
        # Without a tokenizer, whose padding token could be a prompt's own: the mask has told what padding is.
        arguments = Arguments(prompts, call.max_new_tokens, guidance, seeds, None)
        rows = arguments.rows(decoder.lm, decoder._scheduler.reward)
        run = as_run(rows, decoder.lm, arguments.max_new_tokens, None, False, decoder.phase_timer())
        run.stopping.eos_ids, run.process = call.eos_ids, call.process
        decoder._turns.claim(run)
        return run
