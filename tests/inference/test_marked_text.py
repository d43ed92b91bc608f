from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.reading.shards import Document, open_documents
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from megadlcm.config import RunConfig
from megadlcm.inference.marked_text import (
    SAMPLE_TOKENS,
    choose_documents,
    mark_boundaries,
    marked_text,
    text_batch,
)
from megadlcm.model import DLCM, build_model
from megadlcm.run_folder.files import BOUNDARY_MARK

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return load_tokenizer(corpus / "tokenizer.json")


def documents(domains: str) -> list[Document]:
    return [
        Document(f"{domain}{number}", domain, "", 3, np.arange(3))
        for number, domain in enumerate(domains)
    ]


def mark_at(tokenizer: Tokenizer, text: str, *places: int) -> str:
    tokens = tokenizer.encode(text)
    return mark_boundaries(tokens, [place in places for place in range(len(tokens))], tokenizer)


def test_a_mark_stands_before_the_boundary_token(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("two small birds")
    pieces = [tokenizer.decode([token]) for token in tokens]
    assert len(pieces) > 2
    marked = mark_at(tokenizer, "two small birds", 1)
    assert marked == pieces[0] + BOUNDARY_MARK + "".join(pieces[1:])


def test_a_boundary_at_the_first_token_needs_no_mark(tokenizer: Tokenizer) -> None:
    assert mark_at(tokenizer, "two small", 0) == "two small"


def test_a_mark_waits_for_the_end_of_a_split_character(tokenizer: Tokenizer) -> None:
    """The bytes of a character that the tokenizer does not know are tokens of their own."""
    text = "a\U0001f426b"
    assert len(tokenizer.encode(text)) == 6
    for place in (2, 3, 4):
        assert mark_at(tokenizer, text, place) == text  # no boundary follows where it could stand
    assert mark_at(tokenizer, text, 2, 5) == f"a\U0001f426{BOUNDARY_MARK}b"
    assert mark_at(tokenizer, text, 1, 3, 5) == f"a{BOUNDARY_MARK}\U0001f426{BOUNDARY_MARK}b"


def test_without_concepts_nothing_is_marked(tokenizer: Tokenizer) -> None:
    assert mark_boundaries(tokenizer.encode("two small"), [], tokenizer) == "two small"


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(min_size=1, max_size=30), mask=st.lists(st.booleans(), min_size=200))
def test_marks_are_all_that_is_added_to_the_text(
    tokenizer: Tokenizer, text: str, mask: list[bool]
) -> None:
    text = text.replace(BOUNDARY_MARK, "")
    tokens = tokenizer.encode(text)
    marked = mark_boundaries(tokens, mask[: len(tokens)], tokenizer)
    assert marked.replace(BOUNDARY_MARK, "") == text
    assert marked.count(BOUNDARY_MARK) <= sum(mask[: len(tokens)])


def test_every_domain_is_seen_before_one_is_seen_twice() -> None:
    chosen = choose_documents(documents("aaabbc"), 5)
    assert [document.id for document in chosen] == ["a0", "b3", "c5", "a1", "b4"]
    assert len(choose_documents(documents("aab"), 9)) == 3
    assert choose_documents(documents("aab"), 0) == choose_documents([], 4) == []


def test_a_marked_text_shows_what_the_model_decides(
    make_run: Callable[..., RunConfig], corpus: Path, tokenizer: Tokenizer
) -> None:
    config = make_run()
    model = build_model(config.model, config.mup).eval()
    assert isinstance(model, DLCM)
    document = next(iter(open_documents(corpus / "valid")))
    batch = text_batch(document, tokenizer.eos_id, CPU)
    assert batch.tokens_T.tolist() == [tokenizer.eos_id, *document.tokens_T.tolist()]
    with torch.no_grad():
        mask_T = model(batch.tokens_T, batch.cu_seqlens).boundary_mask_T
    text = marked_text(document, mask_T.tolist(), tokenizer)
    heading, body = text.rstrip("\n").split("\n")
    ratio = len(mask_T) / int(mask_T.sum())
    assert heading == f"== {document.domain} / {document.id}: {ratio:.2f} tokens per concept =="
    assert body.replace(BOUNDARY_MARK, "") == tokenizer.decode(document.tokens_T)
    assert body.count(BOUNDARY_MARK) == int(mask_T[2:].sum()) > 0


def test_a_long_document_is_shown_in_part(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the cat " * SAMPLE_TOKENS)
    document = Document("long", "en", "", 8 * SAMPLE_TOKENS, np.array(tokens))
    text = marked_text(document, [], tokenizer)
    shown = tokenizer.decode(tokens[: SAMPLE_TOKENS - 1])
    assert text == f"== en / long: no concepts ==\n{shown}\n"
