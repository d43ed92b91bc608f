"""`megadlcm data inspect | verify`: commands on a finished shard folder."""

from __future__ import annotations

import argparse
from typing import Any

from data_pipeline.commands.arguments import add_command, integer, local
from data_pipeline.errors import InputError, StorageError
from data_pipeline.masking import masked
from data_pipeline.tables import printable

INSPECT_EXAMPLE = """\
example:
  megadlcm data inspect shards/mix
  megadlcm data inspect s3://bucket/shards --urls    # what stock webdataset reads

Reads index.json, shards.npy and prepared.json, nothing else."""

VERIFY_EXAMPLE = """\
example:
  megadlcm data verify shards/mix
  megadlcm data verify s3://bucket/shards --cache-dir cache --workers 4

Reads every byte once: tokenizer, sizes, digests, each record as webdataset would read it against
the document table and its checksums, counts by domain, shards that the index does not list.
exit codes: 0 all as written, 1 the storage did not give some bytes, 2 problems found"""


def add_folder_parsers(commands: Any) -> None:
    """Adds `inspect` and `verify`; each sets `run`.

    Args:
        commands: the commands of `data`, what argparse's add_subparsers returned.
    """
    inspect = add_command(commands, "inspect", "what is in a shard folder", INSPECT_EXAMPLE)
    add_location(inspect)
    shown = inspect.add_mutually_exclusive_group()
    shown.add_argument("--shards", action="store_true", help="list the shards")
    shown.add_argument("--urls", action="store_true", help="list the tar files, one a line")
    inspect.set_defaults(run=run_inspect)

    verify = add_command(commands, "verify", "check every byte of a shard folder", VERIFY_EXAMPLE)
    add_location(verify)
    verify.add_argument(
        "--workers",
        type=integer(1),
        metavar="N",
        help="processes that verify shards (default: one per processor core)",
    )
    verify.add_argument(
        "--cache-dir",
        type=local(str),
        metavar="DIR",
        help="local folder for copies of shards, needed for a URL",
    )
    verify.set_defaults(run=run_verify)


def add_location(parser: argparse.ArgumentParser) -> None:
    """Adds the shard folder of a command."""
    parser.add_argument("location", metavar="DIR_OR_URL", help="shard folder, or URL of one")


def run_inspect(arguments: argparse.Namespace) -> int:
    """Prints shards, tokenizer and domains of a shard folder."""
    from data_pipeline.inspection.describe import (
        describe,
        read_altered,
        shard_table,
        shard_urls,
    )
    from data_pipeline.shard_format.index import read_index
    from data_pipeline.storage.open import open_storage

    storage = open_storage(arguments.location)
    index = read_index(arguments.location, storage)
    if arguments.urls:
        for url in shard_urls(index, storage):
            print(url)
    else:
        print(shard_table(index) if arguments.shards else describe(index, read_altered(storage)))
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Prints every problem of a shard folder.

    Raises:
        InputError: there is one.
        StorageError: there are none, as far as the storage gave the bytes.
    """
    from data_pipeline.inspection.describe import describe_altered, read_altered
    from data_pipeline.inspection.verify import Unread, available_cores, verify_folder
    from data_pipeline.shard_format.index import read_index
    from data_pipeline.storage.interface import StorageOptions
    from data_pipeline.storage.open import open_storage

    # Cores of the job, not of the machine: more processes than that only wait for each other.
    workers = available_cores() if arguments.workers is None else arguments.workers
    location = arguments.location
    options = StorageOptions(cache_dir=arguments.cache_dir)
    storage = open_storage(location, options)
    index = read_index(location, storage)
    num_problems = num_unread = 0
    for problem in verify_folder(index, options, workers):
        # At once: of a large folder the first problem may come hours before the last.
        print(printable(masked(problem)), flush=True)
        num_problems += 1
        num_unread += isinstance(problem, Unread)
    # Wrong bytes outweigh unread ones: they stay wrong when the storage answers again.
    if num_problems > num_unread:
        raise InputError(f"{location}: problems found: {num_problems}; prepare it again")
    if num_unread:
        raise StorageError(
            f"{location}: not read: {num_unread} shards or files; check the storage, verify again"
        )
    print(
        f"{printable(masked(location))}: {len(index.shards):,} shards, "
        f"{index.num_documents:,} documents, {index.num_tokens:,} tokens, all as written"
    )
    if altered := read_altered(storage):
        print(f"altered by the tokenizer: {describe_altered(altered)}")
    return 0
