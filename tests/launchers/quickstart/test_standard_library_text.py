"""The quickstart's corpus: the same text each time, none of it lost, what is held out unseen."""

from __future__ import annotations

import ast
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from launchers.quickstart.standard_library_text import write_corpus

CODE_BYTES = 1_000_000
DOMAINS = ("code", "en")
SPLITS = ("train", "valid")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a small corpus."""
    return write_corpus(tmp_path_factory.mktemp("text"), CODE_BYTES)


def read(path: Path) -> list[dict[str, Any]]:
    """Documents of a file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def names(corpus: dict[str, Path], split: str, kind: str) -> set[str]:
    """Names of the documents of a split whose id has this beginning, without it."""
    documents = [document for domain in DOMAINS for document in read(corpus[f"{domain}_{split}"])]
    ids = [document["id"] for document in documents]
    return {name.removeprefix(kind) for name in ids if name.startswith(kind)}


def modules(corpus: dict[str, Path], split: str) -> set[str]:
    """Names of the source files of a split."""
    return {document["id"] for document in read(corpus[f"code_{split}"])}


def test_the_corpus_is_a_function_of_the_installation(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    again = write_corpus(tmp_path, CODE_BYTES)
    assert {name: path.read_bytes() for name, path in again.items()} == {
        name: path.read_bytes() for name, path in corpus.items()
    }


def test_every_domain_has_documents_of_its_own_in_both_splits(corpus: dict[str, Path]) -> None:
    assert set(corpus) == {f"{domain}_{split}" for domain in DOMAINS for split in SPLITS}
    for domain in DOMAINS:
        for split in SPLITS:
            documents = read(corpus[f"{domain}_{split}"])
            assert documents and {document["domain"] for document in documents} == {domain}
            assert all(document["text"].strip() for document in documents)
    for split in SPLITS:
        assert names(corpus, split, "docstrings/")


def test_a_larger_corpus_has_more_code(corpus: dict[str, Path], tmp_path: Path) -> None:
    smaller = write_corpus(tmp_path, CODE_BYTES // 4)
    for files, least in ((corpus, CODE_BYTES), (smaller, CODE_BYTES // 4)):
        texts = [document["text"] for split in SPLITS for document in read(files[f"code_{split}"])]
        size = sum(len(text.encode("utf-8")) for text in texts)
        assert least < size < least + 500_000  # the last file may be a long one
    assert modules(smaller, "train") < modules(corpus, "train")


def test_code_is_counted_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a link that leads nowhere is no source."""
    root = tmp_path / "python"
    root.mkdir()
    (root / "absent.py").symlink_to("nowhere.py")
    for name in ("a.py", "b.py", "c.py"):
        (root / name).write_text("# " + "\u5929" * 100, encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(root))
    assert len((root / "a.py").read_bytes()) == 302
    for max_bytes, expected in ((301, {"a.py"}), (302, {"a.py", "b.py"})):
        corpus = write_corpus(tmp_path / "text", max_bytes)
        assert modules(corpus, "train") | modules(corpus, "valid") == expected


def test_no_document_is_held_out_and_trained(corpus: dict[str, Path]) -> None:
    texts: dict[str, set[str]] = {split: set() for split in SPLITS}
    ids: list[str] = []
    for domain in DOMAINS:
        for split in SPLITS:
            documents = read(corpus[f"{domain}_{split}"])
            texts[split] |= {document["text"] for document in documents}
            ids += [document["id"] for document in documents]
    assert len(ids) == len(set(ids))
    assert not texts["train"] & texts["valid"]


def test_docstrings_are_held_out_with_the_source_that_contains_them(
    corpus: dict[str, Path],
) -> None:
    """Else most of the held-out prose would have been trained, inside of code."""
    trained, held_out = modules(corpus, "train"), modules(corpus, "valid")
    assert names(corpus, "train", "docstrings/") <= trained
    assert names(corpus, "valid", "docstrings/") <= held_out
    assert not trained & held_out
    assert not [name for name in trained | held_out if name.startswith("pydoc_data")]


def test_no_document_is_lost_or_changed(corpus: dict[str, Path]) -> None:
    """Every source file up to the last one is there, and every docstring of enough length."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = {
        document["id"]: document["text"]
        for domain in DOMAINS
        for split in SPLITS
        for document in read(corpus[f"{domain}_{split}"])
    }
    found = modules(corpus, "train") | modules(corpus, "valid")
    for name in found:
        text = documents[name]
        assert text == (root / name).read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(text)) or ""
        if len(docstring) >= 200:
            assert docstring in documents[f"docstrings/{name}"]
    top = {path.name for path in root.glob("*.py") if path.read_text(encoding="utf-8").strip()}
    last = max(name for name in found if "/" not in name)
    assert {name for name in top if name <= last} <= found


def test_help_topics_are_all_there(corpus: dict[str, Path]) -> None:
    topics = pytest.importorskip(
        "pydoc_data.topics",
        reason="no pydoc_data; install the whole library",
    ).topics
    found = {split: names(corpus, split, "topic/") for split in SPLITS}
    long_enough = {name for name, text in topics.items() if len(text) >= 200}
    assert found["train"] | found["valid"] == long_enough
    assert not found["train"] & found["valid"]
