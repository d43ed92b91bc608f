"""The evaluation against a loop over documents, one window at a time, in fp64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from data_pipeline.tokenizer import load_tokenizer
from megadlcm.config import RunConfig
from megadlcm.inference.evaluation import NUM_POSITIONS, Evaluator, position_in_concept
from megadlcm.model import DLCM, LanguageModel, build_model
from megadlcm.parallel.process_group import join_process_group

MakeRun = Callable[..., RunConfig]


def evaluator(config: RunConfig, corpus: Path) -> Evaluator:
    eos_id = load_tokenizer(corpus / "tokenizer.json").eos_id
    return Evaluator(config, join_process_group(), eos_id)


def fp64_model(config: RunConfig, offset: float = 0.0) -> LanguageModel:
    """A fresh model; a lower offset of the detector gives longer concepts."""
    model = build_model(config.model, config.mup, seed=config.seed).double()
    if isinstance(model, DLCM):
        model.boundary_detector.offset.fill_(offset)
    return model


class Token(NamedTuple):
    """What the plain loop says about one label."""

    document: int
    domain: str
    loss: float
    position: int
    """Tokens since the newest boundary; 0 at a boundary."""


class Text(NamedTuple):
    """One held-out text."""

    domain: str
    text: str


def held_out(corpus: Path) -> list[Text]:
    records = [json.loads(line) for line in (corpus / "valid.jsonl").read_text().splitlines()]
    return [Text(record["domain"], record["text"]) for record in records]


def plain_loop(model: LanguageModel, corpus: Path, seq_len: int) -> Iterator[Token]:
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    model.eval()
    for number, (domain, text) in enumerate(held_out(corpus)):
        stream = torch.tensor([tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id])
        for start in range(0, len(stream) - 1, seq_len):
            inputs_T = stream[start : min(start + seq_len, len(stream) - 1)]
            with torch.no_grad():
                output = model(inputs_T, torch.tensor([0, len(inputs_T)], dtype=torch.int32))
            log_prob_TV = output.logits_TV.log_softmax(-1)
            mask = [] if output.boundary_mask_T is None else output.boundary_mask_T.tolist()
            position = 0
            for index in range(len(inputs_T)):
                position = 0 if not mask or mask[index] else position + 1
                label = int(stream[start + index + 1])
                yield Token(number, domain, -float(log_prob_TV[index, label]), position)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def expected_row(tokens: list[Token], texts: list[Text]) -> dict[str, Any]:
    domains = ("code", "en")
    loss = {name: [token.loss for token in tokens if token.domain == name] for name in domains}
    size = {
        name: sum(len(text.encode()) for domain, text in texts if domain == name)
        for name in domains
    }
    starts = {
        name: sum(token.position == 0 for token in tokens if token.domain == name)
        for name in domains
    }
    by_position = [
        [token.loss for token in tokens if token.position == position]
        for position in range(NUM_POSITIONS)
    ]
    return {
        "eval_loss": mean([token.loss for token in tokens]),
        "eval_tokens": len(tokens),
        "bits_per_byte": sum(map(math.fsum, loss.values())) / math.log(2) / sum(size.values()),
        "bits_per_byte_by_domain": {
            name: math.fsum(loss[name]) / math.log(2) / size[name] for name in domains
        },
        "loss_by_domain": {name: mean(loss[name]) for name in domains},
        "tokens_per_concept": {name: len(loss[name]) / starts[name] for name in domains},
        "tokens_per_concept_overall": len(tokens) / sum(starts.values()),
        "loss_by_position": [mean(losses) if losses else None for losses in by_position],
    }


def assert_same_rows(row: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    assert row.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, list):
            assert [entry is None for entry in row[key]] == [entry is None for entry in value]
            row_numbers = [entry for entry in row[key] if entry is not None]
            assert row_numbers == pytest.approx([e for e in value if e is not None], rel=rel), key
        else:
            assert row[key] == pytest.approx(value, rel=rel), key


@pytest.mark.parametrize("offset", [0.0, -0.8])
def test_the_sums_are_those_of_a_plain_loop(make_run: MakeRun, corpus: Path, offset: float) -> None:
    config = make_run()
    model = fp64_model(config, offset)
    tokens = list(plain_loop(model, corpus, config.data.seq_len))
    texts = held_out(corpus)
    row = evaluator(config, corpus).run(model)
    assert_same_rows(row, expected_row(tokens, texts), rel=1e-12)
    # the cases that could go wrong are there: windows, both domains, long and short concepts
    assert len(tokens) > len(texts) * config.data.seq_len
    assert row["tokens_per_concept"]["en"] != row["tokens_per_concept"]["code"]
    longest = max(token.position for token in tokens)
    assert (longest >= NUM_POSITIONS) == (offset < 0) and row["tokens_per_concept_overall"] > 1


def test_a_model_without_concepts_has_no_rows_about_them(make_run: MakeRun, corpus: Path) -> None:
    config = make_run(model={"architecture": "dense"})
    model = fp64_model(config)
    expected = expected_row(list(plain_loop(model, corpus, config.data.seq_len)), held_out(corpus))
    about_concepts = ("tokens_per_concept", "tokens_per_concept_overall", "loss_by_position")
    expected = {key: value for key, value in expected.items() if key not in about_concepts}
    assert_same_rows(evaluator(config, corpus).run(model), expected, rel=1e-12)


def test_packing_does_not_matter(make_run: MakeRun, corpus: Path) -> None:
    rows, counts = [], []
    for batch_tokens in (1, 70, 1_000_000):
        config = make_run(evaluation={"batch_tokens": batch_tokens})
        found = evaluator(config, corpus)
        sizes = [len(batch.tokens_T) for batch in found.batches()]
        assert all(size <= max(batch_tokens, config.data.seq_len) for size in sizes)
        counts.append(len(sizes))
        rows.append(found.run(fp64_model(config)))
    assert counts[0] > counts[1] > counts[2] == 1
    for row in rows[1:]:
        assert_same_rows(row, rows[0], rel=1e-12)


def test_windows_that_saw_their_predecessor_would_have_another_loss(
    make_run: MakeRun, corpus: Path
) -> None:
    """Negative control: the comparison sees where a window ends."""
    config = make_run()
    model = fp64_model(config)
    longer = make_run(data={"seq_len": 2 * config.data.seq_len})
    losses = [evaluator(entry, corpus).run(model)["eval_loss"] for entry in (config, longer)]
    assert abs(losses[0] - losses[1]) > 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(make_run: MakeRun, corpus: Path, training: bool) -> None:
    config = make_run()
    model = fp64_model(config).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    evaluator(config, corpus).run(model)
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_an_evaluation_draws_nothing(make_run: MakeRun, corpus: Path) -> None:
    """Training mode samples its boundaries; an evaluation in between must not."""
    config = make_run()
    model = fp64_model(config)
    rows = [evaluator(config, corpus).run(model.train(mode)) for mode in (True, False, True)]
    assert rows[0] == rows[1] == rows[2]


def test_max_documents_are_the_first_of_each_source(make_run: MakeRun, corpus: Path) -> None:
    sources = [{"path": str(corpus / name), "name": name} for name in ("valid", "short")]
    config = make_run(data={"valid": sources}, evaluation={"max_documents": 2})
    documents = evaluator(config, corpus).documents
    assert [document.id for document in documents] == ["valid0", "valid1", "short0", "short1"]


def test_positions_count_from_the_newest_boundary() -> None:
    mask_T = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0, 0]).bool()
    assert position_in_concept(mask_T).tolist() == [0, 1, 2, 0, 0, 1, 0, 1, 2, 3]
