"""Documents to a shard folder: tar shards, their document tables, tokenizer.json, index.json last.

The same documents and options give the same bytes, whatever the number of processes and however
often they are killed. A folder without index.json is unfinished, whatever else it holds. Everything
is written to a subfolder and moved up when all of it is there: what the folder held before outlives
a prepare that fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import InputError, StorageError
from data_pipeline.options import PART_BYTES, SHARD_TOKENS, check_least
from data_pipeline.output_folder import make_output_folder
from data_pipeline.prepare.deduplicate import duplicates_of, find_duplicates
from data_pipeline.prepare.documents import describe_left_out
from data_pipeline.prepare.encode import Batch, DocumentRules, Encoders, encode_batch, make_batches
from data_pipeline.prepare.formats.format import Piece, Position
from data_pipeline.prepare.inputs import find_inputs
from data_pipeline.prepare.parts import PartWriter, resume_part
from data_pipeline.prepare.pieces import ReadProgress, read_pieces
from data_pipeline.prepare.plan import Plan
from data_pipeline.prepare.publish import is_decided, is_published, publish, published
from data_pipeline.prepare.round_trip import check_tokenizer
from data_pipeline.prepare.work_folder import DIGESTS_FILE, PART_LOCK, WorkFolder
from data_pipeline.progress import Progress, say
from data_pipeline.shard_format.index import INDEX_FILE, ShardIndex
from data_pipeline.storage.locks import FileLock
from data_pipeline.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class PrepareOptions:
    """What `megadlcm data prepare` is asked to do."""

    inputs: tuple[str, ...]
    """File names, globs or directories, in reading order."""
    tokenizer: Path
    """Tokenizer file or folder."""
    output: Path
    """Shard folder to write."""
    shard_tokens: int = SHARD_TOKENS
    """Most text tokens of a shard; a longer document has a shard of its own."""
    domain: str | None = None
    """Domain of documents that name none; None means "code" in source trees, else "text"."""
    workers: int = 1
    """Processes that encode; the result does not depend on it."""
    skip_empty: bool = False
    """Leave out and count documents without tokens instead of refusing them."""
    overwrite: bool = False
    """Replace a finished shard folder, another tokenizer.json, or the work of another plan."""
    min_tokens: int | None = None
    """Leave out and count documents with fewer tokens."""
    max_tokens: int | None = None
    """Leave out and count documents with more tokens."""
    allow_altered: bool = False
    """Keep and count documents whose tokens spell another text instead of refusing them; those of
    a spelling that Unicode calls equivalent are kept and counted in any case."""
    deduplicate: bool = False
    """Leave out and count documents whose text occurred before."""
    part_bytes: int = PART_BYTES
    """Input files are worked on in parts of this size; shards end where a part ends."""
    task: int = 0
    """Which parts are for this process: task, task + num_tasks, ..."""
    num_tasks: int = 1
    """Among how many processes the parts are shared; the result does not depend on it."""

    @property
    def rules(self) -> DocumentRules:
        return DocumentRules(
            self.domain, self.skip_empty, self.min_tokens, self.max_tokens, self.allow_altered
        )


@dataclass(frozen=True)
class Prepared:
    """How far a shard folder is."""

    index: ShardIndex | None
    """Of the finished folder; None while parts are missing, which other tasks are to do."""
    left_out: Counter[str]
    """Documents and files that are not in the shards, by reason; of the parts that are complete."""
    altered: int
    """Documents in the shards whose tokens spell another text; of the parts that are complete."""
    num_parts: int
    """Parts of the whole."""
    missing_parts: tuple[int, ...] = ()
    """Numbers of those that are not complete."""
    num_tasks: int = 1
    """Among how many tasks the parts are shared."""
    was_finished: bool = False
    """Whether the folder was finished before this call."""

    @property
    def whats_missing(self) -> str:
        """Which parts are not complete, for people."""
        tasks = sorted({part % self.num_tasks for part in self.missing_parts})
        named = ", ".join(map(str, tasks[:20])) + (", ..." if len(tasks) > 20 else "")
        return (
            f"{len(self.missing_parts):,} of {self.num_parts:,} parts are missing, of the tasks "
            f"{named} of {self.num_tasks}; the last to end finishes the folder"
        )


def prepare(options: PrepareOptions) -> Prepared:
    """Writes a shard folder, or goes on with one.

    A call with the same options continues where an earlier one was killed. What is finished at an
    error stays for it, too.

    Args:
        options: what to do.

    Raises:
        InputError: unusable options, a flaw of the input, a folder that must not be replaced, or
            another process that does the same work.
        StorageError: reading or writing fails.
    """
    _check_options(options)
    tokenizer = load_tokenizer(options.tokenizer)
    for remark in check_tokenizer(tokenizer, options.allow_altered):
        say(remark)
    left_out: Counter[str] = Counter()
    plan = Plan(
        files=tuple(find_inputs(options.inputs, left_out)),
        tokenizer_sha256=tokenizer.sha256,
        shard_tokens=options.shard_tokens,
        part_bytes=options.part_bytes,
        deduplicate=options.deduplicate,
        rules=options.rules,
        left_out=left_out,
    )
    work = WorkFolder(options.output)
    try:
        # Before anything is made: a late task of an array writes nothing to a finished folder.
        if not work.folder.exists() and _is_done(options, plan):
            return Prepared(*published(options.output), len(plan.parts), was_finished=True)
        _check_output(options, tokenizer, work, plan)
        make_output_folder(options.output, "--output")
        return _Preparation(options, plan, tokenizer, work).run()
    except OSError as error:
        raise StorageError(
            f"--output {options.output}: {error.filename or 'a file'} cannot be written or read "
            f"({error.strerror or error}); start the same command again when it can: it goes on"
        ) from error


def _check_options(options: PrepareOptions) -> None:
    for name in ("shard_tokens", "workers", "part_bytes", "num_tasks", "min_tokens", "max_tokens"):
        check_least(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    if not 0 <= options.task < options.num_tasks:
        raise InputError(
            f"--task {options.task}: must be >= 0 and below --num-tasks {options.num_tasks}; "
            "number the tasks from 0",
            key="--task",
        )
    if options.max_tokens is not None and (options.min_tokens or 1) > options.max_tokens:
        raise InputError(
            f"--max-tokens {options.max_tokens}: must be >= --min-tokens {options.min_tokens}; "
            "no document could pass",
            key="--max-tokens",
        )


def _is_done(options: PrepareOptions, plan: Plan) -> bool:
    """Whether nothing is to be done: not even to do it again, which one process alone may."""
    again = options.overwrite and options.num_tasks == 1
    return not again and is_published(options.output, plan)


def _check_output(
    options: PrepareOptions, tokenizer: Tokenizer, work: WorkFolder, plan: Plan
) -> None:
    """Raises InputError where the folder holds what only --overwrite may replace."""
    output, kept = options.output, options.output / TOKENIZER_FILE
    if output.exists() and not output.is_dir():
        raise InputError(
            f"--output {output}: is a file, must be a folder; choose another name", key="--output"
        )
    stored = work.read_plan() if work.folder.is_dir() else None
    # The same plan goes on, or is done already: neither takes anything away.
    if options.overwrite or stored == plan.contents or is_published(output, plan):
        return
    if (output / INDEX_FILE).exists():
        raise InputError(
            f"--output {output}: holds finished shards; choose another folder or pass --overwrite",
            key="--output",
        )
    if stored is not None and work.holds_work():
        raise InputError(
            f"--output {output}: was begun by another plan ({plan.difference(stored)}); repeat "
            "that command, choose another folder, or pass --overwrite to begin anew",
            key="--output",
        )
    # It may be what another corpus, prepared elsewhere, was encoded with.
    if kept.is_file() and kept.read_bytes() != tokenizer.contents:
        raise InputError(
            f"--output {output}: holds another {TOKENIZER_FILE} than --tokenizer "
            f"{options.tokenizer}; choose another folder or pass --overwrite",
            key="--output",
        )


@dataclass
class _PartWork:
    """A part that this process is at."""

    lock: FileLock
    writer: PartWriter
    end: Position
    """Where its input ends, once all of it was read."""


@dataclass
class _Preparation:
    """One process's share of a prepare."""

    options: PrepareOptions
    plan: Plan
    tokenizer: Tokenizer
    work: WorkFolder
    read: ReadProgress = field(default_factory=ReadProgress)
    at: dict[int, _PartWork] = field(default_factory=dict)

    def run(self) -> Prepared:
        """Does the parts of this task, and publishes when all are complete."""
        with self.work.gate():
            if self._settle():
                return self._published(was_finished=True)
            # Inside of the gate: between the look and the join nobody can clear the folder.
            working = self.work.join()
        try:
            with working:
                try:
                    self._do_parts()
                except FileNotFoundError:
                    if self.work.read_plan() is not None:
                        raise
                return self._finish()  # whoever removed the plan has published, or is to be named
        except BaseException:
            with suppress(OSError), self.work.gate():
                # What took a while to make stays for the next start; an empty beginning only looks
                # like work.
                if not self.work.holds_work():
                    self.work.discard()
                elif self.work.read_plan() is not None:
                    say(f"what is finished stays in {self.work.folder}; the same command goes on")
            raise

    def _settle(self) -> bool:
        """Sets the work folder up, or finishes it where that is all that is left to do."""
        _check_output(self.options, self.tokenizer, self.work, self.plan)
        stored = self.work.read_plan()
        if stored == self.plan.contents:
            # A publication that was cut off: the shards may have moved already, so it is finished,
            # not redone.
            if is_decided(self.work):
                self._publish()
                return True
            return False
        if _is_done(self.options, self.plan):
            return True
        if stored is not None:
            self.work.clear()
        self.work.begin(self.plan)
        return False

    def _do_parts(self) -> None:
        options = self.options
        count = len(self.plan.parts)
        with ExitStack() as stack:
            encoders = stack.enter_context(Encoders(self.tokenizer, options.rules, options.workers))
            stack.callback(self._close)
            # Every num_tasks-th: parts of one size are spread over the tasks, whatever the order of
            # files.
            own = range(options.task, count, options.num_tasks)
            open_parts = [number for number in own if not self.work.is_complete(number)]
            if not open_parts and not options.deduplicate:
                return
            # A task without parts of its own helps here too: all wait for the digests of all.
            if options.deduplicate and self._missing():
                find_duplicates(self.work, self.plan, encoders, options.task, options.num_tasks)
            if not open_parts:
                return
            self._encode(encoders, list(own), open_parts)

    def _encode(self, encoders: Encoders, own: list[int], open_parts: list[int]) -> None:
        sizes = {number: sum(f.num_bytes for f in self.plan.parts[number]) for number in own}
        total = sum(sizes.values())
        done = total - sum(sizes[number] for number in open_parts)
        # What an earlier start did counts as done, else the bar would begin anew.
        self.read.finished_bytes = done
        num_tokens = 0
        with Progress("prepare", total, "tokens", done) as progress:
            for batch, encoded in encoders.map(encode_batch, self._batches(open_parts)):
                part = self.at[batch.part]
                before = part.writer.num_tokens
                part.writer.add(batch, encoded)
                num_tokens += part.writer.num_tokens - before
                if batch.is_last:
                    part.writer.finish(part.end)
                    part.lock.close()
                    del self.at[batch.part]
                progress.update(self.read.done_bytes, num_tokens)

    def _batches(self, numbers: list[int]) -> Iterator[Batch]:
        """Yields the batches of parts; each is locked when its first one is asked for."""
        for number in numbers:
            lock = self.work.lock_part(number)
            if lock is None:
                raise InputError(
                    f"--output {self.options.output}: another process is at part {number} of it; "
                    "wait for it, or give every process a --task of its own",
                    key="--output",
                )
            if self.work.is_complete(number):  # by another process, since it was looked at
                lock.close()
                continue
            folder = self.work.part(number)
            # Other files in there are those of deduplication, which are not made again.
            state = resume_part(folder, keep=(PART_LOCK, DIGESTS_FILE))
            writer = PartWriter(folder, state, self.options.shard_tokens)
            part = self.at[number] = _PartWork(lock, writer, state.position)
            pieces = self._pieces(number, part, state.position)
            repeated = duplicates_of(self.work, number) if self.plan.deduplicate else None
            yield from make_batches(number, pieces, repeated)

    def _close(self) -> None:
        for part in self.at.values():
            part.writer.close()
            part.lock.close()

    def _pieces(self, number: int, part: _PartWork, start: Position) -> Iterator[Piece]:
        files = self.plan.parts[number]
        end = start.number
        for piece in read_pieces(files, self.read, start):
            end = piece.end_number
            yield piece
        # Known only when all was read: behind the last file, so that a restart opens none.
        part.end = Position(len(files), 0, end)

    def _missing(self) -> tuple[int, ...]:
        numbers = range(len(self.plan.parts))
        return tuple(number for number in numbers if not self.work.is_complete(number))

    def _finish(self) -> Prepared:
        """Publishes when no part is missing, unless another process has done so."""
        missing = self._missing()
        with self.work.gate():
            if self.work.read_plan() == self.plan.contents:
                # Looked at again inside of the gate: the last part may have come in between.
                if missing := tuple(n for n in missing if not self.work.is_complete(n)):
                    count, tasks = len(self.plan.parts), self.options.num_tasks
                    return Prepared(None, *self._so_far(), count, missing, tasks)
                self._publish()
            elif not is_published(self.options.output, self.plan):
                raise InputError(
                    f"--output {self.options.output}: another process removed the work of this "
                    "one; start the command again when no other writes there",
                    key="--output",
                )
        return self._published()

    def _published(self, was_finished: bool = False) -> Prepared:
        found = published(self.options.output)
        return Prepared(*found, len(self.plan.parts), was_finished=was_finished)

    def _so_far(self) -> tuple[Counter[str], int]:
        """Returns what was left out, and how many are altered, in complete parts of this task."""
        own = range(self.options.task, len(self.plan.parts), self.options.num_tasks)
        states = [state for number in own if (state := self.work.read_complete(number))]
        left_out = sum((state.left_out for state in states), self.plan.left_out)
        return left_out, sum(state.altered for state in states)

    def _publish(self) -> None:
        states = [self.work.read_complete(number) for number in range(len(self.plan.parts))]
        parts = [state for state in states if state is not None]
        left_out = sum((part.left_out for part in parts), self.plan.left_out)
        # An index without shards would be refused by every reader: say now what was left out.
        if not any(part.shards for part in parts):
            self.work.finish()  # there is nothing to go on with
            raise InputError(
                f"--input {' '.join(self.options.inputs)}: no documents in {len(self.plan.files)} "
                f"files ({describe_left_out(left_out) or 'nothing left out'}); check the pattern",
                key="--input",
            )
        publish(self.work, self.plan, self.tokenizer, parts)
