"""Texts of models and users as data: shown by terminals, pages, tables and figures, never obeyed."""

from __future__ import annotations

import re

# Control characters but tab and line feed (C0, C1), what changes the direction of writing, and lone surrogates.
_STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text that is only shown: what would steer a terminal or a page is replaced by its code, as in `\\x1b`."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)
