"""Tables that tell what is in a shard folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_pipeline.index import DomainCounts, ShardIndex


def domain_table(domains: Mapping[str, DomainCounts]) -> str:
    """Returns documents, tokens, bytes and bytes per token of each domain and of all."""
    total = DomainCounts(*(sum(column) for column in zip(*domains.values(), strict=True)))
    counts = [*sorted(domains.items()), ("all", total)]
    rows = [
        (name, f"{c.documents:,}", f"{c.tokens:,}", f"{c.bytes:,}", f"{c.bytes / c.tokens:.2f}")
        for name, c in counts
    ]
    return text_table(("domain", "documents", "tokens", "bytes", "bytes/token"), rows)


def describe(index: ShardIndex) -> str:
    """Returns what `megadlcm data inspect` prints."""
    sizes = [shard.num_tokens for shard in index.shards]
    facts = [
        ("folder", str(index.folder)),
        ("shards", f"{len(sizes):,} of {min(sizes):,} to {max(sizes):,} tokens"),
        ("stored", f"{sum(shard.tar_bytes for shard in index.shards):,} bytes in tar files"),
        ("tokens", f"{index.token_dtype}, largest {index.max_token_id}"),
        ("as trained", f"{index.num_stream_tokens:,} tokens an epoch, one eos per document"),
        ("tokenizer", f"{index.vocab_size:,} entries, eos {index.eos_id}"),
        ("", f"sha256 {index.tokenizer_sha256}"),
    ]
    lines = [f"{name:<12}{value}" for name, value in facts]
    return "\n".join([*lines, "", domain_table(index.domains)])


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns rows in columns, the first to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    )
