"""The parts of a report, written as Markdown or as one self-contained HTML page."""

from __future__ import annotations

import base64
import html as entities
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from rgtg_fast.plaintext import printable


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Notes:
    """A list of lines; urgent ones are warnings."""

    lines: tuple[str, ...]
    urgent: bool = False


@dataclass(frozen=True)
class Table:
    """A table of texts; all columns but the first are right-aligned."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Drawing:
    """A figure: its file name without ending, what it shows, and its SVG."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class SideBySide:
    """The answers of several methods to one prompt: (method, facts about the answer, its text)."""

    prompt: str
    answers: tuple[tuple[str, str, str], ...]


Part = Text | Notes | Table | Drawing | SideBySide


@dataclass(frozen=True)
class Section:
    """A heading and the parts under it."""

    title: str
    parts: tuple[Part, ...]


def markdown(title: str, sections: Sequence[Section], figures: str) -> str:
    """The report in Markdown.

    Args:
        title: heading of the page.
        sections: sections of the page.
        figures: folder of the drawings, relative to the page.
    """
    blocks = [f"# {title}"] if title else []
    for section in sections:
        if section.title:
            blocks.append(f"## {section.title}")
        blocks += [_markdown(part, figures) for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def _markdown(part: Part, figures: str) -> str:
    if isinstance(part, Text):
        return _inline(part.text)
    if isinstance(part, Notes):
        return "\n".join(f"- {'**Note:** ' if part.urgent else ''}{_inline(line)}" for line in part.lines)
    if isinstance(part, Drawing):
        caption = _inline(part.caption)
        return f"![{caption}]({figures}/{part.name}.svg)\n\n*{caption}*"
    if isinstance(part, Table):
        ruler = ["---", *["--:"] * (len(part.head) - 1)]
        return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in (part.head, ruler, *part.rows))
    lines = [f"**{_inline(part.prompt)}**", ""]
    lines += [
        f"- **{_inline(method)}** ({_inline(known)}): {_inline(text)}" for method, known, text in part.answers
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|")


def _inline(text: str) -> str:
    """A text in one line, with the characters escaped that have a meaning in Markdown."""
    line = printable(" ".join(text.split()))
    for character in "\\`*_[]<>#&~$":
        line = line.replace(character, f"\\{character}")
    return line


def escape(text: str) -> str:
    """A text escaped for HTML, for an element or an attribute between double quotes."""
    return entities.escape(printable(text))


def html(title: str, sections: Sequence[Section]) -> str:
    """The report as an HTML page that loads nothing and runs no script."""
    style = files("rgtg_fast.evaluation.study").joinpath("report.css").read_text(encoding="utf-8")
    body = []
    for section in sections:
        if section.title:
            body.append(f"<h2>{escape(section.title)}</h2>")
        body += [_html(part) for part in section.parts]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _html(part: Part) -> str:
    if isinstance(part, Text):
        return f"<p>{escape(part.text)}</p>"
    if isinstance(part, Notes):
        kind = "urgent" if part.urgent else "notes"
        return f'<ul class="{kind}">{"".join(f"<li>{escape(line)}</li>" for line in part.lines)}</ul>'
    if isinstance(part, Drawing):
        # As images, because the ids inside two inline drawings would clash.
        data = base64.b64encode(part.svg.encode()).decode()
        source, caption = f"data:image/svg+xml;base64,{data}", escape(part.caption)
        return f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'
    if isinstance(part, Table):
        head = "".join(f"<th>{escape(text)}</th>" for text in part.head)
        rows = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in part.rows)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    answers = "".join(
        f'<div class="answer"><h4>{escape(method)}</h4><p class="known">{escape(known)}</p><p>{escape(text)}</p></div>'
        for method, known, text in part.answers
    )
    return f'<section><h3>{escape(part.prompt)}</h3><div class="side">{answers}</div></section>'
