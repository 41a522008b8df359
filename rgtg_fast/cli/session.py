"""Sets up a decoder for the command line: quiet libraries, the default model, the reward."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rgtg_fast.bundled import embedded
from rgtg_fast.cli.jobs import Prompt
from rgtg_fast.errors import RGTGError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rgtg_fast import RewardGuidedDecoder

# Words that `--reward` takes in place of a path or hub id.
CONTRASTIVE, NONE = "contrastive", "none"
# The guide of the embedded model, trained for it.
BUNDLED = "bundled:pargs"


@dataclass(frozen=True)
class Setup:
    """The options that choose models and their engine."""

    lm: str | None = None
    reward: str = CONTRASTIVE
    better: str | None = None
    worse: str | None = None
    dtype: str | None = None
    device: str | None = None
    engine: str = "auto"
    max_batch: int = 8
    max_length: int | None = None
    graphs: bool | None = None
    compile: bool = False
    pad_batch: bool = False

    def __post_init__(self) -> None:
        if self.reward != CONTRASTIVE and (self.better is not None or self.worse is not None):
            raise RGTGError(
                f"--better and --worse belong to --reward {CONTRASTIVE}, not to --reward {self.reward}"
            )

    def names(self) -> dict[str, Any]:
        """The models by name, as every output row tells them."""
        names: dict[str, Any] = {"lm": self.lm or embedded.NAME, "reward_model": self.reward}
        if self.better is not None or self.worse is not None:
            names |= {"better": self.better, "worse": self.worse}
        return names

    def source(self, progress: Callable[[str], None]) -> str:
        """The language model's path or hub id; the embedded one, converted if need be, by default."""
        return self.lm if self.lm is not None else str(embedded.default_model(progress))

    def reward_source(self) -> Any:
        """What `from_pretrained` takes as the reward; names of guides are read there (`named_guide`)."""
        if self.reward == NONE:
            return None
        if self.reward != CONTRASTIVE:
            return self.reward
        from rgtg_fast import ContrastiveReward

        prompts = {"better": self.better, "worse": self.worse}
        return ContrastiveReward(**{name: text for name, text in prompts.items() if text is not None})

    def pair(self, progress: Callable[[str], None]) -> Any:
        """The language model and its tokenizer, loaded once for several decoders."""
        quiet()
        source = self.source(progress)
        from rgtg_fast.models.loading import load_causal_lm

        return load_causal_lm(source, self.device, self.dtype)

    def decoder(self, progress: Callable[[str], None], pair: Any = None) -> "RewardGuidedDecoder":
        """Loads the models.

        Args:
            say: receives one line of text before something slow.
            pair: the language model and its tokenizer, where they are loaded already.
        """
        quiet()
        source = pair if pair is not None else self.source(progress)
        from rgtg_fast import RewardGuidedDecoder

        return RewardGuidedDecoder.from_pretrained(
            source,
            reward=self.reward_source(),
            device=self.device,
            dtype=self.dtype,
            max_batch=self.max_batch,
            max_length=self.max_length,
            engine=self.engine,
            graphs=self.graphs,
            compile=self.compile,
            pad_batch=self.pad_batch,
        )


def default_reward(lm: str | None, better: str | None, worse: str | None, support: str = "lm") -> str:
    """The guide where none is named: the bundled one where it fits, else one that every language model has.

    Args:
        lm: the language model, None for the embedded one.
        better, worse: prompts of the contrastive guide, which are no use to another.
        support: of the guidance; all but "lm" need a guide over the whole vocabulary.
    """
    fits = lm is None and better is None and worse is None and support == "lm"
    return BUNDLED if fits else CONTRASTIVE


def quiet() -> None:
    """Keeps the progress bars, notes and retries of the Hugging Face libraries off the terminal."""
    if importlib.util.find_spec("transformers") is None:
        raise RGTGError("transformers is not installed: `pip install rgtg-fast` brings it")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # A warning is one line too, without the place in the code that gave it.
    warnings.formatwarning = lambda message, *place: f"{message}\n"


def tokenizer_of(decoder: "RewardGuidedDecoder") -> "PreTrainedTokenizerBase":
    """The tokenizer, which every model that is named on the command line comes with."""
    assert decoder.tokenizer is not None
    return decoder.tokenizer


def decode_with(decoder: "RewardGuidedDecoder") -> Callable[[list[int]], str]:
    """Token ids to text."""
    tokenizer = tokenizer_of(decoder)
    return lambda ids: str(tokenizer.decode(ids))


def as_chat(prompt: Prompt, decoder: "RewardGuidedDecoder", chat: bool) -> Prompt:
    """A text as one user message, where that is wanted and the model has a chat template."""
    if chat and isinstance(prompt, str) and tokenizer_of(decoder).chat_template is not None:
        return [{"role": "user", "content": prompt}]
    return prompt
