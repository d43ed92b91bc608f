"""Passwords and tokens in URLs: shown nowhere, saved nowhere. Stdlib only."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
# of a web server the name may be the secret itself
_WEB_USER = re.compile(r"(?i)(https?://)[^/\s?#]+@")
# to the last @ before another URL: a password that was not escaped may hold any sign. Digits and a
# slash are a port, and what is in brackets an address
_PASSWORD = re.compile(r"(://[^/\s:?#\[]*):(?!\d{1,5}[/?#])(?:(?!://)\S)+@")
# a value goes on to the next key, whatever signs it holds
_PARAMETER = re.compile(r"([?&;#])([^\s=?&;#]+)=(\S*?)(?=[?&;#][^\s=?&;#]+=|\s|$)")
# apiKey, api_key, APIKey and X-Api-Key are the same words
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORDS = {"key", "sig", "auth", "oauth", "authorization", "pass", "pwd", "jwt"}
# with anything before them, unlike `monkey` or `author`
_SECRET_ENDINGS = (
    *("token", "secret", "signature", "password", "passwd", "passphrase"),
    *("credential", "credentials", "apikey", "accesskey", "secretkey", "privatekey", "accountkey"),
)

_LEAST_SECRET = 4
"""Letters: a shorter one would be found in every word."""


def masked(text: str) -> str:
    """Returns a text in which no URL shows a password, or a parameter's token.

    A user's name stays where it comes with a protocol other than http.
    """
    if "://" not in text:
        return text
    text = _PASSWORD.sub(rf"\1:{MASK}@", text)
    text = _WEB_USER.sub(rf"\g<1>{MASK}@", text)
    return _PARAMETER.sub(_masked_parameter, text)


def masked_in(text: str, url: str) -> str:
    """Also masks the secrets of a URL where they stand alone: libraries take URLs apart."""
    text = masked(text)
    secrets = [found[0][len(found[1]) :].strip(":@") for found in _PASSWORD.finditer(url)]
    secrets += [
        found[3] for found in _PARAMETER.finditer(url) if _masked_parameter(found) != found[0]
    ]
    for secret in secrets:
        if len(secret) >= _LEAST_SECRET:
            text = text.replace(secret, MASK)
    return text


def _masked_parameter(found: re.Match[str]) -> str:
    sign, key = found[1], found[2]
    words = [word.lower() for word in _WORD.findall(key)]
    secret = any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS) for word in words)
    return f"{sign}{key}={MASK}" if secret and found[3] else found[0]


def masked_values(value: Any) -> Any:
    """Returns plain data (mappings, lists, numbers, text) with all of its text masked."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {key: masked_values(entry) for key, entry in value.items()}
    return [masked_values(entry) for entry in value] if isinstance(value, list | tuple) else value
