"""Makes texts of models and users safe to show in terminals, pages, tables and figures."""

from __future__ import annotations

import re

# Control characters (C0, C1) except tab and line feed, characters that change the writing direction, lone surrogates.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Replaces the control characters of a text by their codes, as in `\\x1b`."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
