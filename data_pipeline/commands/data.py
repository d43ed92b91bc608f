"""`megadlcm data tokenizer | prepare | inspect | verify`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.commands.arguments import add_command, integer, local
from data_pipeline.commands.inspection import add_folder_parsers
from data_pipeline.errors import InputError
from data_pipeline.options import PART_BYTES, SHARD_TOKENS
from data_pipeline.tables import printable

DATA_EXAMPLE = """\
example:
  megadlcm data tokenizer --input 'corpus/*.jsonl.gz' --vocab-size 32000 --output tokenizer.json
  megadlcm data prepare --input 'corpus/*.jsonl.gz' --tokenizer tokenizer.json --output shards
  megadlcm data verify shards"""

PREPARE_EXAMPLE = """\
example:
  megadlcm data prepare --input 'corpus/en/*.jsonl.gz' --input 'corpus/zh/*.jsonl.gz' \\
      --tokenizer tokenizer.json --output shards/mix

  megadlcm data prepare --input 'corpus/*.parquet' --tokenizer tokenizer.json \\
      --output shards/mix --workers 16 --task $SLURM_ARRAY_TASK_ID --num-tasks 100

inputs: .txt (one file, one document); .jsonl, .json, .ndjson (one object a line with a `text` and,
if known, id, domain and source), also as .gz and .zst; .parquet (such columns); a directory (every
text file below it). A prepare that was stopped or killed goes on when it is called again in the
same way; so does a task of an array, and whichever task is last finishes the folder."""

TOKENIZER_EXAMPLE = """\
example:
  megadlcm data tokenizer --input 'corpus/**/*.jsonl.gz' --vocab-size 32000 \\
      --output tokenizer.json"""


def add_data_parser(subparsers: Any) -> Any:
    """Adds `data` and its commands; each sets `run`.

    Args:
        subparsers: what argparse's add_subparsers returned (its type has no public name).

    Returns:
        The commands of `data`, for others to add theirs.
    """
    data = add_command(subparsers, "data", "tokenizers and shard folders", DATA_EXAMPLE)
    commands = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)

    # In the order in which a user needs them, which is that of the help.
    _add_tokenizer(commands)
    _add_prepare(commands)
    add_folder_parsers(commands)
    return commands


def _add_tokenizer(commands: Any) -> None:
    tokenizer = add_command(
        commands, "tokenizer", "train a byte-level BPE tokenizer", TOKENIZER_EXAMPLE
    )
    _add_input(tokenizer)
    tokenizer.add_argument(
        "--vocab-size", type=integer(1), required=True, metavar="N", help="most entries it may have"
    )
    tokenizer.add_argument(
        "--output", type=local(Path), required=True, metavar="FILE", help="tokenizer.json to write"
    )
    tokenizer.add_argument("--overwrite", action="store_true", help="replace an existing file")
    tokenizer.set_defaults(run=run_tokenizer)


def _add_prepare(commands: Any) -> None:
    prepare = add_command(
        commands, "prepare", "text to WebDataset shards and an index", PREPARE_EXAMPLE
    )
    _add_input(prepare)
    prepare.add_argument(
        "--tokenizer",
        type=local(Path),
        required=True,
        metavar="FILE",
        help="tokenizer.json, or a folder with it or with vocab.json and merges.txt",
    )
    prepare.add_argument(
        "--output", type=local(Path), required=True, metavar="DIR", help="shard folder to write"
    )
    prepare.add_argument(
        "--shard-tokens",
        type=integer(1),
        default=SHARD_TOKENS,
        metavar="N",
        help="most tokens of a shard (default: %(default)s)",
    )
    prepare.add_argument(
        "--domain",
        metavar="NAME",
        help="domain of documents that name none (default: code in source trees, else text)",
    )
    prepare.add_argument("--skip-empty", action="store_true", help="leave out empty documents")
    # None, not 0, is their default: prepared.json keeps what was asked for.
    for name, what in (("min", "fewer"), ("max", "more")):
        prepare.add_argument(
            f"--{name}-tokens",
            type=integer(1),
            metavar="N",
            help=f"leave out documents of {what} tokens",
        )
    prepare.add_argument(
        "--allow-altered",
        action="store_true",
        help="keep and count documents that do not come back from their tokens",
    )
    prepare.add_argument(
        "--deduplicate", action="store_true", help="keep the first of documents with equal texts"
    )
    _add_sharing(prepare)
    prepare.add_argument("--overwrite", action="store_true", help="replace finished shards")
    prepare.set_defaults(run=run_prepare)


def _add_sharing(prepare: argparse.ArgumentParser) -> None:
    """Adds who does the work: processes of one task, and tasks of an array."""
    # none of it shapes a byte of the result but --part-bytes, at whose ends shards end
    prepare.add_argument(
        "--workers",
        type=integer(1),
        default=1,
        metavar="N",
        help="encoding processes (default: 1, on all cores)",
    )
    prepare.add_argument(
        "--task",
        type=integer(0),
        default=0,
        metavar="I",
        help="number of this task, from 0 (default: 0)",
    )
    prepare.add_argument(
        "--num-tasks", type=integer(1), default=1, metavar="N", help="tasks that share the work"
    )
    prepare.add_argument(
        "--part-bytes",
        type=integer(1),
        default=PART_BYTES,
        metavar="N",
        help="input that a task takes up at once; shards end with it (default: %(default)s)",
    )


def run_tokenizer(arguments: argparse.Namespace) -> int:
    """Trains a tokenizer on the documents and writes its tokenizer.json."""
    from data_pipeline.output_folder import make_output_folder, write_durably
    from data_pipeline.prepare.documents import describe_left_out, read_documents
    from data_pipeline.prepare.inputs import find_inputs
    from data_pipeline.prepare.pieces import ReadProgress
    from data_pipeline.progress import Progress, say
    from data_pipeline.tokenizer import decode_tokenizer, train_tokenizer

    output: Path = arguments.output
    _check_tokenizer_file(output, arguments.overwrite)
    left_out: Counter[str] = Counter()
    files = find_inputs(arguments.input, left_out)
    make_output_folder(output.parent, "--output")
    total = sum(file.num_bytes for file in files)
    read = ReadProgress()

    def texts() -> Iterator[str]:
        # The library takes an iterator and says nothing while it merges: so the end of reading is
        # told.
        number = 0
        with Progress("read", total, "documents") as progress:
            documents = read_documents(files, read, left_out, skip_empty=True)
            for number, document in enumerate(documents, 1):
                progress.update(read.done_bytes, number)
                yield document.text
        if number:
            say(f"merging to {arguments.vocab_size:,} entries; for a large corpus it takes minutes")

    contents = train_tokenizer(texts(), arguments.vocab_size)
    write_durably(output, contents)
    trained = decode_tokenizer(contents, output)
    if left_out:
        print(f"left out: {describe_left_out(left_out)}")
    print(f"{printable(str(output))}: {trained.vocab_size:,} entries, eos {trained.eos_id}")
    # A small corpus runs out of pairs; the model is to be made for what there is.
    if trained.vocab_size < arguments.vocab_size:
        print(f"the text gave no more than that; --vocab-size was {arguments.vocab_size:,}")
    return 0


def _check_tokenizer_file(output: Path, overwrite: bool) -> None:
    """Raises InputError where writing the file would take something away."""
    from data_pipeline.shard_format.index import INDEX_FILE

    if output.is_dir():
        raise InputError(
            f"--output {output}: is a folder, must be a file; add its name", key="--output"
        )
    if (output.parent / INDEX_FILE).exists():
        raise InputError(
            f"--output {output}: {output.parent} holds finished shards, whose tokenizer must stay; "
            "choose another folder",
            key="--output",
        )
    if output.exists() and not overwrite:
        raise InputError(
            f"--output {output}: exists; choose another name or pass --overwrite", key="--output"
        )


def run_prepare(arguments: argparse.Namespace) -> int:
    """Writes a shard folder, or a task's share of it, and prints what is in it by domain."""
    from data_pipeline.inspection.describe import describe_altered, domain_table
    from data_pipeline.prepare.documents import describe_left_out
    from data_pipeline.prepare.write_shards import PrepareOptions, prepare

    options = PrepareOptions(
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        shard_tokens=arguments.shard_tokens,
        domain=arguments.domain,
        workers=arguments.workers,
        skip_empty=arguments.skip_empty,
        overwrite=arguments.overwrite,
        min_tokens=arguments.min_tokens,
        max_tokens=arguments.max_tokens,
        allow_altered=arguments.allow_altered,
        deduplicate=arguments.deduplicate,
        part_bytes=arguments.part_bytes,
        task=arguments.task,
        num_tasks=arguments.num_tasks,
    )
    prepared = prepare(options)
    if prepared.index is not None:
        print(domain_table(prepared.index.domains))
    if prepared.left_out:
        print(f"left out: {describe_left_out(prepared.left_out)}")
    if prepared.altered:
        print(f"altered by the tokenizer: {describe_altered(prepared.altered)}")
    output = printable(str(options.output))
    if prepared.index is not None:
        # A late task of an array ends with 0: to find all done is no failure.
        earlier = ", already finished" if prepared.was_finished else ""
        print(f"{output}: {len(prepared.index.shards):,} shards{earlier}")
    else:
        print(f"{output}: {prepared.whats_missing}")
    return 0


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        action="append",
        type=local(str),
        required=True,
        metavar="GLOB",
        help="file, glob in quotes, or directory; may be repeated",
    )
