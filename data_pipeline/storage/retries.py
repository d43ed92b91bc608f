"""Calls that fail for a while: tried again after growing pauses, then an error that names the file.

A file that is not there is no such failure: it is reported at once.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from data_pipeline.errors import InputError, StorageError
from data_pipeline.masking import masked, masked_in
from data_pipeline.storage.interface import StorageOptions

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

LONGEST_WAIT_SECONDS = 30.0
_SAID_AT_ONCE = (
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError),
    *(InputError, StorageError),  # what `read` itself has found out
)


def with_retries(
    read: Callable[[], Result],
    what: str,
    options: StorageOptions,
    transient: tuple[type[BaseException], ...] = (OSError,),
    done: str = "read",
) -> Result:
    """Returns what `read` returns, trying again after failures that may pass.

    Args:
        read: reads something, or changes it so that a second time changes nothing more.
        what: the file, for messages.
        options: number of attempts and pauses.
        transient: failures worth another attempt; no such file and no permission never are.
        done: what `read` does to the file, for messages: it "cannot be read".

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: at once.
        InputError: permission denied, or raised by `read` itself.
        StorageError: every attempt failed, or raised by `read` itself.
    """
    url, what, wait = what, masked(what), options.wait_seconds
    for attempt in range(1, options.attempts + 1):
        try:
            return read()
        except _SAID_AT_ONCE:
            raise
        # An OSError as well, but one that no pause mends.
        except PermissionError as error:
            raise InputError(f"{what}: cannot be {done} (permission denied); change it") from error
        except transient as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise StorageError(
                    f"{what}: too many open files; raise the limit of the process (`ulimit -n`), "
                    "or read fewer sources"
                ) from error
            reason = masked_in(" ".join(str(error).split()), url) or type(error).__name__
            if attempt == options.attempts:
                raise StorageError(
                    f"{what}: cannot be {done} after {attempt} attempts ({reason}); "
                    "check the storage and start again"
                ) from error
            logger.warning(
                "%s: attempt %d failed (%s), again in %.1f s", what, attempt, reason, wait
            )
            time.sleep(wait)
            # Doubling: an overloaded storage is not helped by readers that all come back at once.
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
    raise AssertionError("no attempt was made")
