"""Passwords and tokens in URLs: shown nowhere, saved nowhere. Stdlib only."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
# its end; of a URL that went through a path one slash is left
_SCHEME = r"[A-Za-z0-9][A-Za-z0-9+.-]:/+"
_ANY_URL = re.compile(_SCHEME)
# of a web server the name may be the secret itself
_WEB_USER = re.compile(r"(?i)(https?:/+)[^/\s?#]+@")
# what is before a port where an @ comes later: another name there is a user's
_HOST = r"(?:[^/\s:?#\[]*[.@][^/\s:?#\[]*|localhost)"
# to the last @ before another URL: a password that was not escaped may hold any sign, and blanks,
# but none that leads from one quoted text into another. What is in brackets is an address, and a
# word without an @ that begins with digits a port
_PASSWORD = re.compile(
    rf"({_SCHEME})(?!{_HOST}:\d{{1,5}}[/?#])([^/\s:?#\[]*):"
    r"(?!\d{1,5}(?:[^\w\s@][^\s@]*)?(?:\s|$))"
    r"(?:(?!://)\S)+(?:[ \t]+(?:(?!://)[^\s\"'`])+)*@"
)
# a value goes on to the next key, whatever signs it holds
_PARAMETER = re.compile(r"([?&;#])([^\s=?&;#]+)=(\S*?)(?=[?&;#][^\s=?&;#]+=|\s|$)")
# apiKey, api_key, APIKey and X-Api-Key are the same words
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORDS = {
    *("key", "sig", "hmac", "auth", "oauth", "authorization", "pass", "pwd", "jwt", "sas", "otp"),
    *("cred", "creds", "bearer", "session", "sid", "cookie"),
}
# with anything before them, unlike `monkey` or `author`
_SECRET_ENDINGS = (
    *("token", "secret", "signature", "password", "passwd", "passphrase", "passcode"),
    *("credential", "credentials", "apikey", "accesskey", "secretkey", "privatekey", "accountkey"),
    "sessionid",
)

_LEAST_SECRET = 4
"""Letters: a shorter one would be found in every word."""


def is_url(location: object) -> bool:
    """Whether a text or path is a URL, which only some things can be read from."""
    return "://" in str(location)


def is_remote(location: object) -> bool:
    """Whether it is a URL of something else than a folder of this machine."""
    return is_url(location) and not str(location).startswith("file://")


def masked(text: str) -> str:
    """Returns a text in which no URL shows a password, or a parameter's token.

    A user's name stays where it comes with a protocol other than http.
    """
    if ":/" not in text or not _ANY_URL.search(text):
        return text
    text = _PASSWORD.sub(rf"\1\2:{MASK}@", text)
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
