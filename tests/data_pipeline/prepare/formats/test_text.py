"""Files that are documents: their marks, and what is no text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import zstandard

from data_pipeline.errors import InputError
from data_pipeline.prepare.documents import read_documents
from data_pipeline.prepare.formats import fields
from data_pipeline.prepare.inputs import find_inputs
from data_pipeline.prepare.pieces import ReadProgress, read_pieces
from tests.support.tiny_shards import one_line


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """Nor does it count as a byte; elsewhere it is a character."""
    path = tmp_path / "tree" / "a.txt"
    path.parent.mkdir()
    path.write_bytes(b"\xef\xbb\xbfone\xef\xbb\xbf")
    for pattern in (path, path.parent):
        files = find_inputs([str(pattern)], Counter())
        (found,) = read_documents(files, ReadProgress(), Counter())
        assert (found.text, found.num_bytes) == ("one\ufeff", 6)


@pytest.mark.parametrize("contents", ["English".encode("utf-16-le"), b"a\0b"])
def test_a_text_with_null_characters_is_none(contents: bytes, tmp_path: Path) -> None:
    """UTF-16 without a mark is valid UTF-8 where the letters are those of English."""
    path = tmp_path / "a.txt"
    path.write_bytes(contents)
    files = find_inputs([str(path)], Counter())
    with pytest.raises(InputError, match=r"a\.txt: character 1 is null.*iconv") as error:
        list(read_documents(files, ReadProgress(), Counter()))
    one_line(error)


def test_a_file_that_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text, a packed one, a file of a source tree; a binary one of any size is left out."""
    monkeypatch.setattr(fields, "RECORD_BYTES", 1 << 21)
    monkeypatch.setattr("data_pipeline.prepare.pieces.PIECE_BYTES", 1 << 10)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.bin").write_bytes(b"\0" + b"a" * (1 << 22))
    (tree / "a.c").write_bytes(b"a" * (1 << 21))
    files = find_inputs([str(tree)], Counter())
    sizes = [len(piece.contents) for piece in read_pieces(files, ReadProgress())]
    assert sizes == [1, 1 << 21]
    (tree / "a.c").write_bytes(b"a" * ((1 << 21) + 1))
    (tmp_path / "a.txt").write_bytes(b"a" * (1 << 23))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"a" * (1 << 23)))
    for pattern in (tree, tmp_path / "a.txt", tmp_path / "a.txt.zst"):
        files = find_inputs([str(pattern)], Counter())
        with pytest.raises(InputError, match=r"/a\.\S+: a record of more than 2,097,152") as error:
            list(read_pieces(files, ReadProgress()))
        one_line(error)
