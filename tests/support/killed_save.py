"""Small saves to any storage, and one that is killed in the middle.

Run as a program, with a URL: it saves the second checkpoint there, and kills itself while only a
part of its file is uploaded.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys

from megadlcm.checkpoint import object_storage
from megadlcm.checkpoint.format import BLOCK_BYTES, write_blocks
from megadlcm.checkpoint.object_storage import ObjectStorage
from megadlcm.checkpoint.retention import prune
from megadlcm.checkpoint.storage import CheckpointStorage

FILE, STATE, NUM_BLOCKS = "rank_00000.safetensors", "state.json", 3
FIRST, SECOND = "step_0000000001", "step_0000000002"


def content_of(name: str) -> bytes:
    """What the file of a checkpoint holds: of the second one blocks that differ."""
    seed = hashlib.sha256(name.encode()).digest()
    num_whole = NUM_BLOCKS - 1 if name == SECOND else 0
    return b"".join(seed[i : i + 1] * BLOCK_BYTES for i in range(num_whole)) + seed


def manifest_of(attempt: str, text: str = "") -> bytes:
    """What stands for a manifest."""
    return f'{{"attempt": "{attempt}", "text": "{text}"}}'.encode()


def save(storage: CheckpointStorage, name: str, attempt: str, text: str = "") -> None:
    """Saves a checkpoint of two files, and keeps it alone."""
    storage.begin(name, attempt, NUM_BLOCKS * BLOCK_BYTES)
    for file, content in ((FILE, content_of(name)), (STATE, b"{}")):
        new = storage.create(name, attempt, file)
        write_blocks(new, [content])
        new.finish()
    storage.publish(name, attempt, manifest_of(attempt, text))
    prune(storage, attempt, name, keep=1)


def whole(storage: CheckpointStorage, name: str) -> bytes:
    """The file of a checkpoint."""
    content = bytearray(storage.size(name, FILE) + 7)
    return bytes(content[: storage.read(name, FILE, 0, memoryview(content))])


def begin(storage: CheckpointStorage, name: str, attempt: str) -> None:
    """Writes the file of a checkpoint, and no more."""
    storage.begin(name, attempt, 1)
    file = storage.create(name, attempt, FILE)
    write_blocks(file, [content_of(name)])
    file.finish()


def die_in_the_middle(url: str) -> None:
    """Leaves a part of a file behind."""
    object_storage.PART_BYTES = 2 * BLOCK_BYTES
    storage, attempt = ObjectStorage(url), "f" * 32
    storage.begin(SECOND, attempt, NUM_BLOCKS * BLOCK_BYTES)
    file = storage.create(SECOND, attempt, FILE)
    for _ in range(NUM_BLOCKS):
        file.write(bytes(BLOCK_BYTES))
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_in_the_middle(sys.argv[1])
