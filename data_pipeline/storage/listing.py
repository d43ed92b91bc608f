"""The page by which a web server lists a folder."""

from __future__ import annotations

import re
from urllib.parse import unquote, urljoin, urlsplit

MOST_LISTING_BYTES = 64 * 2**20
"""Room for the files of 100,000 shards, at 300 bytes a line."""

# without a query: the page links to itself in other orders
_LINK = re.compile(rb"""href\s*=\s*["']?([^"'\s<>?#]+)["'\s>]""", re.IGNORECASE)


def linked_names(page: bytes, url: str) -> list[str]:
    """Returns the names of the files in the folder `url` that its page links to, sorted."""
    base = url.rstrip("/") + "/"
    folder = _place(base)
    names = set()
    for link in _LINK.finditer(page):
        try:
            host, path = _place(urljoin(base, link[1].decode("utf-8", "replace")))
        except ValueError:  # no address at all
            continue
        parent, _, name = path.rpartition("/")
        if name and (host, f"{parent}/") == folder:
            names.add(name)
    return sorted(names)


def _place(url: str) -> tuple[str | None, str]:
    """Returns host and path: links repeat neither a password nor always the protocol."""
    parts = urlsplit(url)
    return parts.hostname, unquote(parts.path)
