"""Arrays in numpy's .npy format: their headers, and whole ones to bytes and back."""

from __future__ import annotations

import io
import threading
from functools import lru_cache
from typing import BinaryIO

import numpy as np

# numpy parses headers with Python's own parser, whose depth of recursion is one number for all
# threads: two at once, with the garbage collector in between, fail with "recursion depth mismatch".
_parsing = threading.Lock()


@lru_cache(maxsize=1 << 16)  # most lengths of a corpus come often
def array_header(dtype: str, length: int) -> bytes:
    """Returns what numpy.save writes before the items of a vector.

    Args:
        dtype: `numpy.dtype.str` of an item.
        length: number of items.
    """
    stored = io.BytesIO()
    facts = {"descr": dtype, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stored, facts)
    return stored.getvalue()


def save_array(array: np.ndarray) -> bytes:
    """Returns the bytes of an array as numpy.save writes them."""
    stored = io.BytesIO()
    np.save(stored, array, allow_pickle=False)
    return stored.getvalue()


def load_array(file: BinaryIO) -> np.ndarray:
    """Reads an array of the .npy format; raises ValueError where the bytes are none."""
    try:
        with _parsing:
            array: np.ndarray = np.load(file, allow_pickle=False)
    except Exception as error:  # numpy's parser of headers lets through what Python's raises
        raise ValueError(f"no array ({' '.join(str(error).split())})") from error
    return array
