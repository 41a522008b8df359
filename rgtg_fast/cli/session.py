"""What the commands have in common: the options of models and of decoding, and loading the decoder."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rgtg_fast.bundled import embedded
from rgtg_fast.cli.jobs import Prompt
from rgtg_fast.config import GUIDANCE, LENGTH, MODELS, Guidance, option
from rgtg_fast.errors import RGTGError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rgtg_fast import RewardGuidedDecoder

# Words that `--reward` takes in place of a path or hub id.
CONTRASTIVE, NONE = "contrastive", "none"
# The reward model that was trained for the embedded language model.
BUNDLED = "bundled:pargs"
# Texts of options that several dataclasses have.
BETA_HELP = "Weight of the reward; 0 is the base model."
LABEL_HELP = "The label whose score is the reward, by name or index, where the reward model has several."
PAIRS_HELP = "Preference pairs: .jsonl, .json, .csv (also .gz), .parquet, or a data set of Hugging Face"
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The options of the models."""

    lm: str | None = option(
        "Language model: path or hub id.", None, MODELS, shown="the embedded SmolLM2-135M-Instruct"
    )
    reward: str | None = option(
        "Reward model: path or hub id, or `bundled:pargs`; after a method's name and a colon for another reward "
        "(`farma:PATH`, `genarm:PATH`, `rad:PATH`, `eft:TUNED,UNTUNED`, `text:PATH`, "
        "`mixture:0.7*pargs:PATH+0.3*contrastive`: see `rgtg-fast methods`); `contrastive` guides with the language "
        "model itself under a better and a worse system prompt; `none` is the language model alone.",
        None,
        MODELS,
        shown="bundled:pargs for the default model, else contrastive",
    )
    reward_label: str | None = option(LABEL_HELP, None, MODELS)
    weights: str | None = option(
        "int8 (native engine, --dtype bfloat16) or int4 rounds the language model's weights to 8 or 4 bits: a half or "
        "a quarter of bfloat16's bytes, and other answers.",
        None,
        MODELS,
        shown="as they are",
    )
    reward_weights: str | None = option(
        "The same for the reward model, and other rewards.",
        None,
        MODELS,
        shown="as they are",
    )
    better: str | None = option("System prompt to move towards (contrastive).", None, MODELS)
    worse: str | None = option("System prompt to move away from (contrastive).", None, MODELS)
    dtype: str | None = option(
        "float32, bfloat16, float16 or float64.", None, MODELS, shown="float32 on a CPU, bfloat16 on a GPU"
    )
    device: str | None = option("cpu or cuda.", None, MODELS, shown="cuda where there is one")
    reward_device: str | None = option(
        "Device of the reward model, such as cuda:1.", None, MODELS, shown="that of the language model"
    )
    tp_plan: str | None = option(
        "auto: the processes that torchrun starts hold the language model together, for one that is larger than a "
        "device.",
        None,
        MODELS,
        shown="each process has the whole model",
    )
    trust_remote_code: bool = option(
        "Run code that comes with the models named by --lm and --reward: read it first.", False, MODELS
    )
    engine: str = option(
        "auto, native (fused C++ layers, CPU), triton (fused kernels, GPU) or transformers.", "auto", MODELS
    )
    graphs: bool | None = option(
        "Replay each step as one CUDA graph.",
        None,
        MODELS,
        shown="on a GPU, where the reward is computed on it",
    )
    compile: bool = option(
        "Compile the models' blocks (torch.compile, --engine transformers): tens of seconds at first, faster steps "
        "on a GPU.",
        False,
        MODELS,
    )
    pad_batch: bool = option(
        "Run --max-batch rows in every step, empty ones where there are fewer: on a GPU an answer then has the same "
        "bits in any batch.",
        False,
        MODELS,
    )
    batch_invariant: bool = option(
        "Compute the products of a step so that an answer has the same bits in any batch, whatever its --k: slower "
        "products than with --pad-batch, no empty rows (--engine triton; native does so by itself).",
        False,
        MODELS,
    )
    chat: bool = option(
        "Wrap a plain prompt as a user message where the model has a chat template.", True, MODELS
    )

    def __post_init__(self) -> None:
        if self.reward not in (None, CONTRASTIVE) and (self.better is not None or self.worse is not None):
            raise RGTGError(
                f"--better and --worse belong to --reward {CONTRASTIVE}, not to --reward {self.reward}"
            )

        if self.reward_label is not None and self.reward in (None, CONTRASTIVE, NONE):
            raise RGTGError(
                "--reward-label belongs to a reward model with several labels: name it with --reward"
            )

        if self.reward_weights is not None and self.reward in (None, CONTRASTIVE, NONE):
            raise RGTGError("--reward-weights belongs to a reward model: name it with --reward")

    def with_reward(self, support: str = "lm") -> "Setup":
        """A copy with a reward: where none is named the bundled one if it fits the models, else the contrastive one.

        Args:
            support: support of the guidance; all but "lm" need a reward over the whole vocabulary.
        """
        if self.reward is not None:
            return self
        fits = self.lm is None and self.better is None and self.worse is None and support == "lm"
        return replace(self, reward=BUNDLED if fits else CONTRASTIVE)

    def names(self) -> dict[str, Any]:
        """The names of the models; every row of the output has them."""
        names: dict[str, Any] = {"lm": self.lm or embedded.NAME, "reward_model": self.reward}
        if self.reward_label is not None:
            names["reward_label"] = self.reward_label
        if self.weights is not None:
            names["weights"] = self.weights
        if self.reward_weights is not None:
            names["reward_weights"] = self.reward_weights
        if self.better is not None or self.worse is not None:
            names |= {"better": self.better, "worse": self.worse}
        return names

    def source(self, progress: Progress) -> str:
        """The language model's path or hub id; the embedded one is converted at its first use."""
        return self.lm if self.lm is not None else str(embedded.default_model(progress))

    def pair(self, progress: Progress) -> Any:
        """The language model and its tokenizer, loaded once for several decoders."""
        quiet()
        source = self.source(progress)
        from rgtg_fast.models.loading import load_causal_lm

        return load_causal_lm(source, self.device, self.dtype, self.trust_remote_code)

    def decoder(
        self, progress: Progress, pair: Any = None, *, max_batch: int = 8, max_length: int | None = None
    ) -> "RewardGuidedDecoder":
        """Loads the models.

        Args:
            progress: receives one line of text before something slow.
            pair: the language model and its tokenizer, where they are loaded already.
            max_batch: prompts at once.
            max_length: tokens of prompt and answer at most; None for what the job needs.
        """
        quiet()
        source = pair if pair is not None else self.source(progress)
        from rgtg_fast import ContrastiveReward, RewardGuidedDecoder

        reward: Any = None if self.reward == NONE else self.reward
        if reward == CONTRASTIVE:
            prompts = {"better": self.better, "worse": self.worse}
            reward = ContrastiveReward(**{name: text for name, text in prompts.items() if text is not None})
        return RewardGuidedDecoder.from_pretrained(
            source,
            reward=reward,
            label=self.reward_label,
            weights=self.weights,
            reward_weights=self.reward_weights,
            device=self.device,
            reward_device=self.reward_device,
            tp_plan=self.tp_plan,
            dtype=self.dtype,
            max_batch=max_batch,
            max_length=max_length,
            engine=self.engine,
            graphs=self.graphs,
            compile=self.compile,
            pad_batch=self.pad_batch,
            batch_invariant=self.batch_invariant,
            trust_remote_code=self.trust_remote_code,
        )

    def as_chat(self, prompt: Prompt, decoder: "RewardGuidedDecoder") -> Prompt:
        """The prompt as one user message if it is a text, the model has a chat template and --no-chat is not given."""
        if self.chat and isinstance(prompt, str) and tokenizer_of(decoder).chat_template is not None:
            return [{"role": "user", "content": prompt}]
        return prompt


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The options of decoding: guidance, lengths and batch."""

    k: int = option("Candidates per token.", 10, GUIDANCE)
    beta: float = option(BETA_HELP, 1.0, GUIDANCE)
    temperature: float = option("0 is greedy.", 1.0, GUIDANCE)
    support: str = option(
        "Where candidates come from: lm, combined or all (the whole vocabulary).", "lm", GUIDANCE
    )
    gate_entropy: float | None = option(
        "Guide only where the language model's entropy is at least this, in nats.",
        None,
        GUIDANCE,
        shown="everywhere",
    )
    strategy: str = option(
        "How tokens are chosen: tokenwise, `best_of_n:n=8`, `segment:target=8.5` or `blockwise:k=4,length=16` "
        "(settings behind the colon; see `rgtg-fast methods`).",
        "tokenwise",
        GUIDANCE,
    )
    seed: int = option("Seed; the same seed and prompt give the same answer.", 0, GUIDANCE)
    max_new_tokens: int = option("Tokens of an answer at most.", 128, LENGTH)
    stop: list[str] | None = option("End the answer before this text (repeatable).", None, LENGTH)
    max_batch: int = option("Prompts decoded at once.", 8, LENGTH)
    max_length: int | None = option(
        "Tokens of prompt and answer at most.", None, LENGTH, shown="what the job needs"
    )

    def guidance(self) -> Guidance:
        """The guidance of every token.

        Raises:
            RGTGError: a value out of range.
        """
        return Guidance(self.k, self.beta, self.temperature, self.support, gate_entropy=self.gate_entropy)


def quiet() -> None:
    """Turns off the progress bars and log messages of the Hugging Face libraries.

    Raises:
        RGTGError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise RGTGError("transformers is not installed: install it with `pip install rgtg-fast`")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # A warning is one line too, without the source line that issued it.
    warnings.formatwarning = lambda message, *place: f"{message}\n"


def tokenizer_of(decoder: "RewardGuidedDecoder") -> "PreTrainedTokenizerBase":
    """The tokenizer; models that the command line loads always have one."""
    assert decoder.tokenizer is not None
    return decoder.tokenizer


def decode_with(decoder: "RewardGuidedDecoder") -> Callable[[list[int]], str]:
    """A function from token ids to text."""
    tokenizer = tokenizer_of(decoder)
    return lambda ids: str(tokenizer.decode(ids))
