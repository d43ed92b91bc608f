"""How many shards a process holds open: files are given back before the system refuses more."""

from __future__ import annotations

import resource
import threading
import weakref
from collections import deque
from typing import Protocol

_LEFT_TO_OTHERS = 256
"""Descriptors that are not for shards: sockets, logs, libraries."""
_LEAST = 16


class Closable(Protocol):
    """Who holds a file and can open it again."""

    def close_file(self) -> None:
        """Gives the file back."""
        ...


class OpenFiles:
    """Lets the shards of all sources together hold so many files; for any number of threads.

    The ones that have been open longest are given back: to open a local file again costs some
    microseconds.
    """

    def __init__(self) -> None:
        self._holders: deque[weakref.ref[Closable]] = deque()
        self._lock = threading.Lock()

    def make_room(self, holder: Closable) -> None:
        """Notes that a file is about to be opened; closes others where there are too many."""
        with self._lock:
            most = most_files()
            while len(self._holders) >= most:
                # some are gone by now, and their files with them
                if (oldest := self._holders.popleft()()) is not None and oldest is not holder:
                    oldest.close_file()
            self._holders.append(weakref.ref(holder))


def most_files() -> int:
    """Files that shards may hold, by the limit of this process (`ulimit -n`)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = 2**20
    # most of a small limit as well, and never none
    return max(limit - _LEFT_TO_OTHERS, limit // 4, _LEAST)


OPEN_FILES = OpenFiles()
"""Those of this process."""
