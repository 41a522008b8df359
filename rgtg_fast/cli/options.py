"""Makes a typer command of a dataclass: its options and arguments are the fields, its help the docstring.

    @dataclass(frozen=True, kw_only=True)
    class Double:
        '''Print a number twice.'''

        number: int = argument("The number.")
        json: bool = json_option()

        def run(self) -> None: ...

    register(app, Double)  # rgtg-fast double [--json] NUMBER

A field with `metadata["help"]` is an option; other keys of the metadata are optional: `panel` (heading in the help),
`flags` (names on the command line, by default `--field-name`), `shown` (the default in words), `min`, `before` (the
option that it comes before in the help) and `argument` (positional).
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Annotated, Any, get_type_hints

import typer

from rgtg_fast.config import OUTPUT, option


def argument(help: str, default: Any = MISSING) -> Any:
    """A field that is a positional argument; without a default it is required."""
    return field(default=default, metadata={"help": help, "argument": True})


def json_option() -> Any:
    """The field `json: bool`, which every command has."""
    return option("Print JSON and nothing else on stdout.", False, OUTPUT)


def include(names: str = "", **defaults: Any) -> Any:
    """A field whose type is another dataclass, and whose options become options of this command.

    Args:
        names: which of its options, in this order, separated by spaces; all by default.
        defaults: other defaults, by option.
    """
    return field(metadata={"include": names.split(), "defaults": defaults})


@dataclass(frozen=True)
class Option:
    """One option or argument.

    Attributes:
        name: name of the field.
        type: type of its value.
        default: MISSING where it is required.
        metadata: metadata of the field.
    """

    name: str
    type: Any
    default: Any
    metadata: Mapping[str, Any]

    def parameter(self) -> inspect.Parameter:
        """The parameter of a function that typer makes this option of."""
        metadata = self.metadata
        shared: dict[str, Any] = {"help": metadata["help"], "rich_help_panel": metadata.get("panel")}
        if metadata.get("argument"):
            kind: Any = typer.Argument(**shared)
        else:
            shown = True if metadata.get("shown") is None else metadata["shown"]
            kind = typer.Option(*self.flags(), **shared, show_default=shown, min=metadata.get("min"))
        default = inspect.Parameter.empty if self.default is MISSING else self.default
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[self.type, kind],
        )

    def flags(self) -> tuple[str, ...]:
        """Its names on the command line."""
        if given := self.metadata.get("flags"):
            return tuple(given)
        name = self.name.replace("_", "-")
        switch = self.type in (bool, bool | None) and self.default is not False
        return (f"--{name}/--no-{name}" if switch else f"--{name}",)


def options_of(cls: type) -> list[Option]:
    """The options of a command's dataclass and of those that it includes, in the order of the help."""
    found: list[Option] = []
    types = get_type_hints(cls)
    for f in fields(cls):
        if "include" in f.metadata:
            found += _included(types[f.name], f.metadata)
        elif "help" in f.metadata:
            names = [each.name for each in found]
            before = f.metadata.get("before")
            place = len(found) if before is None else names.index(before)
            found.insert(place, Option(f.name, types[f.name], f.default, f.metadata))
    return found


def _included(cls: type, metadata: Mapping[str, Any]) -> list[Option]:
    options = {each.name: each for each in options_of(cls)}
    chosen = [options[name] for name in metadata["include"] or options]
    return [replace(each, default=metadata["defaults"].get(each.name, each.default)) for each in chosen]


def from_values(cls: type, values: Mapping[str, Any]) -> Any:
    """The dataclass, and those that it includes, with the values of the options by name."""
    given: dict[str, Any] = {}
    types = get_type_hints(cls)
    for f in fields(cls):
        if "include" in f.metadata:
            names = [each.name for each in _included(types[f.name], f.metadata)]
            given[f.name] = from_values(types[f.name], {name: values[name] for name in names})
        elif f.name in values:
            given[f.name] = values[f.name]
    return cls(**given)


def register(app: typer.Typer, cls: Any) -> None:
    """Adds a dataclass to the app as the command of its name (`TrainPolicy` is `train-policy`).

    Args:
        app: the app.
        cls: a dataclass of options with a method `run`, which does the work.
    """

    def command(**values: Any) -> None:
        from_values(cls, values).run()

    parameters = [each.parameter() for each in options_of(cls)]
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__doc__ = inspect.getdoc(cls)
    app.command(re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower())(command)
