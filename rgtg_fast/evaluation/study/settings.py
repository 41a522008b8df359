"""The settings of a study: prompts, judges and methods, read from a YAML file and checked before models are loaded."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rgtg_fast.config import Guidance
from rgtg_fast.engine.strategies import named_strategy
from rgtg_fast.errors import RGTGError
from rgtg_fast.evaluation.jsonl import plain
from rgtg_fast.training.config import check_answers_ended

NONE = "none"
ENDS = ("always", "finished")
TOKENWISE = "tokenwise"


@dataclass(frozen=True)
class Cell:
    """One method under one setting.

    Attributes:
        method: name of the method.
        reward: name of the reward; None for the base model alone.
        strategy: strategy with its settings; None for token by token.
        guidance: guidance of token-by-token decoding; the default one for strategies and outputs.
        beta: β in the tables; None where it has no meaning.
        top_k: likewise.
        temperature: likewise.
        model: the policy's folder where it is not the study's model.
        outputs: a file of existing answers.
        dtype: dtype if it differs from the study's.
        seeds: seeds of the samples.
    """

    method: str
    reward: str | None
    strategy: str | None
    guidance: Guidance
    beta: float | None
    top_k: int | None
    temperature: float | None
    model: str | None
    outputs: str | None
    dtype: str | None
    seeds: tuple[int, ...]

    @property
    def label(self) -> str:
        """The method's name with the settings that distinguish its cells."""
        parts = [("β", self.beta), ("k", self.top_k), ("τ", self.temperature)]
        settings_text = ", ".join(f"{name} = {value:g}" for name, value in parts if value is not None)
        return f"{self.method} ({settings_text})" if settings_text else self.method

    def setting(self) -> dict[str, Any]:
        """What determines this cell's answers, besides the study's common settings."""
        values: dict[str, Any] = {"reward": self.reward, "model": self.model, "outputs": self.outputs}
        values["dtype"] = self.dtype
        if self.strategy is not None:
            values["strategy"] = self.strategy
        elif self.outputs is None:
            g = self.guidance
            values |= {
                "beta": self.beta,
                "top_k": self.top_k,
                "temperature": g.temperature,
                "support": g.support,
            }
            values["gate_entropy"] = g.gate_entropy
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Method:
    """One entry of the study's `methods`; every combination of values in lists becomes a cell.

    Args:
        name: name in the tables.
        reward: one name or several, as on the command line (`bundled:pargs`, `farma:PATH`, `contrastive`, …); None
            decodes with the base model alone.
        strategy: `best_of_n:n=10`, `segment:target=1`, …; token by token by default.
        best_of: n, short for the strategy `best_of_n:n=…`.
        beta: as in `Guidance`.
        top_k: as k in `Guidance`.
        temperature: as in `Guidance`.
        greedy: short for temperature 0.
        support: as in `Guidance`.
        gate_entropy: as in `Guidance`.
        model: folder of another policy (DPO, …) instead of the study's model.
        outputs: JSON Lines with `prompt`, `response` and, where it is known, `finish_reason`: answers of another
            program, which are judged and not decoded.
        dtype: instead of the study's; float32 avoids the rounding of merging a policy's adapter in bfloat16.
        seeds: instead of the study's.
    """

    name: str
    reward: str | tuple[str, ...] | None = None
    strategy: str | None = None
    best_of: int | None = None
    beta: float | tuple[float, ...] = 1.0
    top_k: int | tuple[int, ...] = 10
    temperature: float | tuple[float, ...] = 1.0
    greedy: bool = False
    support: str = "lm"
    gate_entropy: float | None = None
    model: str | None = None
    outputs: str | None = None
    dtype: str | None = None
    seeds: tuple[int, ...] | None = None

    def cells(self, seeds: tuple[int, ...]) -> list[Cell]:
        """Every combination of the settings.

        Raises:
            RGTGError: a setting out of its range, or two that exclude each other.
        """
        if self.outputs is not None:
            self._alone("outputs", ("reward", "strategy", "best_of", "model"))
            return [Cell(self.name, None, None, Guidance(), None, None, None, None, self.outputs, None, (0,))]
        seeds = self.seeds or seeds
        rewards = [None if reward == NONE else reward for reward in _many(self.reward)]
        strategy = self._strategy()
        temperatures = (0.0,) if self.greedy else _many(self.temperature)
        found = []
        for reward, top_k, temperature in itertools.product(rewards, _many(self.top_k), temperatures):
            name = self.name if len(rewards) == 1 else f"{self.name} {reward or NONE}"
            if strategy is not None:
                if reward is None:
                    raise RGTGError(f"method {self.name!r}: {strategy} chooses by reward: name a reward")
                full = self._full_strategy(strategy, top_k, temperature)
                named_strategy(full)
                sampled = (None, top_k, temperature, self.model, None, self.dtype, seeds)
                cell = Cell(name, reward, full, Guidance(), *sampled)
                found.append(cell)
                continue
            whole = self.support == "all"
            for beta in _many(self.beta) if reward is not None else (0.0,):
                guidance = Guidance(top_k, beta, temperature, self.support, gate_entropy=self.gate_entropy)
                # Greedy answers are the same for every seed.
                own = seeds[:1] if temperature == 0 else seeds
                weight = None if reward is None else float(beta)
                k = None if whole else top_k
                rest = (weight, k, temperature, self.model, None, self.dtype, own)
                found.append(Cell(name, reward, None, guidance, *rest))
        return found

    def _strategy(self) -> str | None:
        if self.best_of is None:
            return None if self.strategy == TOKENWISE else self.strategy
        self._alone("best_of", ("strategy",))
        return f"best_of_n:n={self.best_of}"

    def _alone(self, given: str, others: tuple[str, ...]) -> None:
        for other in others:
            if getattr(self, other) is not None:
                raise RGTGError(f"method {self.name!r}: {given} and {other} exclude each other: keep one")

    def _full_strategy(self, strategy: str, top_k: int, temperature: float) -> str:
        """The strategy with the sampling settings that it does not name itself."""
        extra = [] if "temperature=" in strategy else [f"temperature={temperature:g}"]
        if "top_k=" not in strategy and self.support != "all":
            extra.append(f"top_k={top_k}")
        if not extra:
            return strategy
        return f"{strategy}{',' if ':' in strategy else ':'}{','.join(extra)}"


@dataclass(frozen=True)
class JudgeSettings:
    """A reward model that rates the answers.

    Args:
        model: path, hub id, `bundled:NAME`, or a reward's name such as `text:PATH`.
        ends: "always": every answer is read with an end-of-sequence token after it, also one that was cut off at the
            length limit; "finished": only answers that ended by themselves.

    Raises:
        RGTGError: another value of `ends`.
    """

    model: str
    ends: str = "always"

    def __post_init__(self) -> None:
        if self.ends not in ENDS:
            raise RGTGError(f"ends={self.ends!r} is unknown: use one of {', '.join(ENDS)}")


@dataclass(frozen=True)
class Study:
    """A comparison of decoding methods.

    Args:
        output: folder of the results.
        prompts: a file (.jsonl, .json, .csv, .parquet, or .gz of these) with a field `prompt`, or a list of texts.
        methods: the methods to compare.
        model: base model, path or hub id; None for the embedded one, which the command line fills in.
        judges: reward models by the name that the tables give them; a text is `JudgeSettings(text)`.
        baseline: the method that differences and win rates are against.
        limit: most prompts.
        seeds: samples of each prompt.
        max_new_tokens: most tokens of an answer.
        stop: texts that end an answer.
        batch_size: rows decoded at once.
        dtype: as in `RewardGuidedDecoder.from_pretrained`.
        device: as in `RewardGuidedDecoder.from_pretrained`.
        engine: as in `RewardGuidedDecoder.from_pretrained`.
        judge_dtype: dtype of judges and, on `pairs`, of all reward models: rewards in bfloat16 have many ties. None is
            `dtype`.
        chat: texts become chat messages where the model has a chat template.
        pairs: preference pairs that no model was trained on: accuracy of all reward models by prefix length.
        pairs_limit: most pairs.
        answers_ended: whether the answers of `pairs` and of `outputs` ended, as in `load_pairs`: "auto" by their
            finish_reason, "yes" or "no" for all.
        examples: prompts whose answers the report shows side by side.
        text: text of the file that the study was read from, written to the results.

    Raises:
        RGTGError: an unknown name, or a value out of its range.
    """

    output: str
    prompts: str | tuple[str, ...]
    methods: tuple[Method, ...]
    model: str | None = None
    judges: Mapping[str, JudgeSettings] = field(default_factory=dict)
    baseline: str = "unguided"
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    batch_size: int = 8
    dtype: str | None = None
    judge_dtype: str | None = "float32"
    device: str | None = None
    engine: str = "auto"
    chat: bool = True
    pairs: str | None = None
    pairs_limit: int | None = None
    answers_ended: str = "auto"
    examples: int = 12
    text: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            _at_least(name, getattr(self, name), 1)
        for name in ("limit", "pairs_limit"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("examples", self.examples, 0)
        check_answers_ended(self.answers_ended)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise RGTGError(
                f"seeds={list(self.seeds)} are empty or not all different: use for example [0, 1, 2]"
            )
        if not self.methods:
            raise RGTGError("the study has no methods: name at least the baseline")
        cells = self.cells()
        names = [cell.method for cell in cells]
        own = [method.name for method in self.methods]
        doubled = sorted({name for name in own if own.count(name) > 1})
        if doubled:
            raise RGTGError(f"two methods are called {doubled[0]!r}: give each a name of its own")
        for cell in cells:
            if cells.count(cell) > 1:
                raise RGTGError(f"{cell.label} is twice in the study: name every setting once")
        if self.baseline not in names:
            raise RGTGError(
                f"baseline={self.baseline!r} is not a method of the study: use one of {', '.join(dict.fromkeys(names))}"
            )
        if names.count(self.baseline) > 1:
            raise RGTGError(
                f"the baseline {self.baseline!r} has {names.count(self.baseline)} settings: give it one"
            )

    def cells(self) -> list[Cell]:
        """Every method under every setting, in the order of the file."""
        return [cell for method in self.methods for cell in method.cells(self.seeds)]

    def common(self) -> dict[str, Any]:
        """What determines the answers of every method."""
        values = {"max_new_tokens": self.max_new_tokens, "chat": self.chat}
        return values | {"dtype": self.dtype or "default", "stop": list(self.stop)}

    @classmethod
    def load(cls, path: str | os.PathLike[str], **changes: Any) -> Study:
        """Reads a study from a YAML file; `${NAME}` stands for an environment variable.

        Args:
            changes: fields to set instead of the file's; None leaves them.

        Raises:
            RGTGError: no such file, not YAML, an unknown key, a variable that is not set, or a bad value.
        """
        import yaml

        try:
            text = Path(path).read_text(encoding="utf-8")
            values = yaml.safe_load(_expanded(text, path))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise RGTGError(f"cannot read the study {path}: {reason}") from error
        except RGTGError:
            raise
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            # An impossible date, or a number with thousands of digits, raises a plain ValueError.
            raise RGTGError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error
        if not isinstance(values, dict):
            raise RGTGError(f"{path} contains no settings: begin with for example `prompts: FILE`")
        changed = {name: value for name, value in changes.items() if value is not None}
        changes_text = yaml.safe_dump({"changed on the command line": changed}) if changed else ""
        kept = text + "".join(f"# {line}\n" for line in changes_text.splitlines())
        return replace(cls.of(values | changed, str(path)), text=kept)

    def only(self, names: Sequence[str]) -> Study:
        """The study with these methods and its baseline alone, in the order of the file.

        Raises:
            RGTGError: a name that no method has.
        """
        known = [method.name for method in self.methods]
        for name in names:
            if name not in known:
                raise RGTGError(f"{name!r} is not a method of the study: use {', '.join(known)}")
        kept = tuple(method for method in self.methods if method.name in (*names, self.baseline))
        return replace(self, methods=kept)

    def as_yaml(self) -> str:
        """The study as a file: as it was read, or written out where it comes from Python."""
        import yaml

        if self.text:
            return self.text
        values = plain({name: value for name, value in asdict(self).items() if name != "text"})
        values["methods"] = [
            {
                f.name: plain(getattr(method, f.name))
                for f in fields(Method)
                if getattr(method, f.name) != f.default
            }
            for method in self.methods
        ]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "the study") -> Study:
        """A study from plain values, as they stand in the YAML file.

        Raises:
            RGTGError: an unknown or missing key, or a bad value.
        """
        given = dict(values)
        methods = given.pop("methods", [])
        if not isinstance(methods, list) or not all(isinstance(method, Mapping) for method in methods):
            raise RGTGError(f"{where}: methods is not a list of methods: use `- name: unguided` and so on")
        given["methods"] = tuple(
            _built(Method, method, f"{where}: method {method.get('name', number)!r}")
            for number, method in enumerate(methods)
        )
        judges = given.get("judges") or {}
        if not isinstance(judges, Mapping):
            raise RGTGError(
                f"{where}: judges is not a table of names and models: use `judges: {{name: PATH}}`"
            )
        given["judges"] = {
            str(name): _built(
                JudgeSettings,
                {"model": judge} if isinstance(judge, str) else judge,
                f"{where}: judge {name!r}",
            )
            for name, judge in judges.items()
        }
        return _built(cls, given, where)


def _built(kind: Any, values: Any, where: str) -> Any:
    """A dataclass from the values of a file; lists become tuples."""
    if not isinstance(values, Mapping):
        raise RGTGError(f"{where}: {values!r} is not a table of settings: use `key: value` lines")
    known = {f.name: f for f in fields(kind) if f.name != "text"}
    for name in values:
        if name not in known:
            raise RGTGError(f"{where}: {name!r} is unknown: use {', '.join(known)}")
    for f in known.values():
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values:
            raise RGTGError(f"{where}: {f.name} is missing")
    frozen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    for name, value in frozen.items():
        _check_type(str(known[name].type), name, value, where)
    try:
        return kind(**frozen)
    except RGTGError as error:
        raise RGTGError(f"{where}: {error}") from error


# What the annotations of the settings mean for values from a file.
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "None": (type(None),),
}


def _check_type(annotation: str, name: str, value: Any, where: str) -> None:
    if annotation.startswith(("Mapping", "tuple[Method")):
        return
    for part in annotation.split(" | "):
        many = re.fullmatch(r"tuple\[(\w+), \.\.\.\]", part)
        values = value if many and isinstance(value, tuple) else (value,)
        kinds = _TYPES[many[1] if many else part]
        exact = bool in kinds
        if many and not isinstance(value, tuple):
            continue
        if all(isinstance(one, kinds) and (exact or not isinstance(one, bool)) for one in values):
            return
    readable = annotation.replace("tuple[", "list of ").replace(", ...]", "").replace(" | None", "")
    article = "an" if readable.startswith("int") else "a"
    raise RGTGError(f"{where}: {name}={value!r} is not {article} {readable.replace(' | ', ' or ')}")


def _expanded(text: str, path: object) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise RGTGError(f"{path} uses ${{{match[1]}}}, which is not set: export {match[1]}=… first")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _many(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RGTGError(f"{name}={value!r} is not a whole number >= {least}")


def canonical(setting: Mapping[str, Any]) -> str:
    """A setting as text; equal settings have equal texts."""
    return json.dumps(setting, sort_keys=True, ensure_ascii=False)
