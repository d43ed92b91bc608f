"""Tables that tell what is in a shard folder; read from its index alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from data_pipeline.errors import StorageError
from data_pipeline.masking import masked
from data_pipeline.shard_format.index import DomainCounts, ShardIndex
from data_pipeline.shard_format.prepared import PREPARED_FILE, altered_documents, decode_prepared
from data_pipeline.storage.interface import Storage
from data_pipeline.tables import render_table


def domain_table(domains: Mapping[str, DomainCounts]) -> str:
    """Returns documents, tokens, bytes, bytes per token and share of the tokens by domain."""
    # Summed from the rows shown, so that the table adds up whatever the index says elsewhere.
    total = DomainCounts(*(sum(column) for column in zip(*domains.values(), strict=True)))
    rows = [
        (
            name,
            f"{counts.documents:,}",
            f"{counts.tokens:,}",
            f"{counts.bytes:,}",
            # Bytes of text a token stands for: how well the tokenizer fits the domain.
            f"{counts.bytes / max(counts.tokens, 1):.2f}",
            f"{counts.tokens / max(total.tokens, 1):.1%}",
        )
        for name, counts in [*sorted(domains.items()), ("all", total)]
    ]
    return render_table(("domain", "documents", "tokens", "bytes", "bytes/token", "share"), rows)


def describe_altered(count: int) -> str:
    """Returns how many documents have tokens that spell another text, for people."""
    return f"{count:,} documents, counted with the bytes that their tokens spell"


def read_altered(storage: Storage) -> int:
    """Returns how many documents have tokens that spell another text, as far as it is known."""
    try:
        return altered_documents(decode_prepared(storage.read_bytes(PREPARED_FILE)))
    except (FileNotFoundError, ValueError, RecursionError, StorageError):  # nobody needs that file
        return 0


def describe(index: ShardIndex, altered: int = 0) -> str:
    """Returns what `megadlcm data inspect` prints.

    Args:
        index: of the folder.
        altered: documents whose tokens spell another text.
    """
    rows = index.shards.rows
    tokens, sizes = rows["num_tokens"], rows["tar_bytes"]
    facts = [
        ("folder", masked(index.location)),
        ("shards", f"{len(rows):,} of {tokens.min():,} to {tokens.max():,} tokens"),
        ("stored", f"{sizes.sum():,} bytes in tar files of {sizes.min():,} to {sizes.max():,}"),
        ("tokens", f"{index.token_dtype}, largest {index.max_token_id}"),
        ("as trained", f"{index.num_stream_tokens:,} tokens an epoch, one eos per document"),
        ("tokenizer", f"{index.vocab_size:,} entries, eos {index.eos_id}"),
        ("", f"sha256 {index.tokenizer_sha256}"),
        ("fingerprint", index.fingerprint),
    ]
    if altered:
        facts.append(("altered", describe_altered(altered)))
    return f"{render_table((), facts, left=(0, 1))}\n\n{domain_table(index.domains)}"


def shard_table(index: ShardIndex) -> str:
    """Returns documents, tokens and bytes of each shard."""
    rows = [
        (
            shard.name,
            f"{shard.num_documents:,}",
            f"{shard.num_tokens:,}",
            f"{shard.num_bytes:,}",
            f"{shard.tar_bytes:,}",
        )
        for shard in index.shards
    ]
    return render_table(("shard", "documents", "tokens", "bytes", "tar bytes"), rows)


def shard_urls(index: ShardIndex, storage: Storage) -> Iterator[str]:
    """Yields where each tar file is, as stock webdataset takes it."""
    for shard in index.shards:
        yield storage.path(shard.tar_name)
