"""The bound on a record is one on the memory of the process that encodes it."""

from __future__ import annotations

import subprocess
import sys

from data_pipeline.prepare.formats.fields import RECORD_BYTES
from tests.support.paths import ROOT

_ENCODE = """
import re
from pathlib import Path
from data_pipeline.tokenizer import decode_tokenizer, train_tokenizer

tokenizer = decode_tokenizer(train_tokenizer(["a1"], 257), Path("tokenizer.json"))
text = "a1" * (1 << 19)
# not getrusage: a process begins with the peak of the one that started it
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
tokens = tokenizer.encode_batch([text])[0]
print(len(tokens), (peak() - before) * 1024)
"""


def test_the_largest_record_of_the_worst_text_takes_a_bounded_memory() -> None:
    """Letters and digits in turn: each is a word of its own, and a token."""
    done = subprocess.run(
        [sys.executable, "-c", _ENCODE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    num_tokens, num_bytes = map(int, done.stdout.split())
    assert num_tokens == 1 << 20
    assert num_bytes > 100 << 20  # measured at all
    assert num_bytes * (RECORD_BYTES >> 20) < 5.0 * 2**30
