"""Passwords and tokens in URLs: shown nowhere, saved nowhere. Stdlib only."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
# of a web server the name may be the secret itself
_WEB_USER = re.compile(r"(?i)(https?://)[^/\s@?#]+@")
_PASSWORD = re.compile(r"(://[^/\s:@?#]*):[^/\s?#]+@")
_SECRET_WORD = "token|secret|signature|sig|password|passwd|credential|key|auth"
_SECRET_VALUE = re.compile(rf"(?i)([?&][\w.-]*(?:{_SECRET_WORD})[\w.-]*=)[^&#\s]+")


def masked(text: str) -> str:
    """Returns a text in which no URL shows a password, or a query's token.

    A user's name stays where it comes with a protocol other than http.
    """
    if "://" not in text:
        return text
    text = _PASSWORD.sub(rf"\1:{MASK}@", text)
    text = _WEB_USER.sub(rf"\g<1>{MASK}@", text)
    return _SECRET_VALUE.sub(rf"\g<1>{MASK}", text)


def masked_values(value: Any) -> Any:
    """Returns plain data (mappings, lists, numbers, text) with all of its text masked."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {key: masked_values(entry) for key, entry in value.items()}
    return [masked_values(entry) for entry in value] if isinstance(value, list | tuple) else value
