"""Checkpoints in an object store: no name can be changed there, so the manifest makes them exist.

    step_0000000100/manifest.json          put last, in one request; names the attempt
    step_0000000100/<attempt>/...          the files of the start that wrote it
    latest, pins                           as in a folder

An object is there whole or not at all. Where the store can, the manifest is put on condition that
there is none, so of two starts one publishes. What has no manifest, or is not of the start that it
names, was left by a save or by a removal that was killed. Files may also lie beside the manifest:
so do those of a checkpoint folder that was copied here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from data_pipeline.errors import InputError, StorageError
from data_pipeline.masking import MASK, masked, masked_in
from data_pipeline.storage.connection import Connection, status_of
from data_pipeline.storage.interface import StorageOptions
from data_pipeline.storage.patience import LEAST_BYTES, within_patience
from data_pipeline.storage.retries import with_retries
from megadlcm.checkpoint.format import BLOCK_BYTES
from megadlcm.checkpoint.storage import PINS, NewFile, pins_text
from megadlcm.run_folder import files

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PART_BYTES = 8 * BLOCK_BYTES
"""Of an upload: whole blocks, as are read at once; S3 takes 10,000 parts, so files of 312 GiB."""
_LISTING_BYTES = 10 * LEAST_BYTES
_ATTEMPT = re.compile(r"[0-9a-f]{32}")
_MANIFEST = re.compile(rf"({files.STEP_PATTERN})/{re.escape(files.MANIFEST)}")
_FILE = re.compile(rf"(?P<name>{files.STEP_PATTERN})/(?P<attempt>{_ATTEMPT.pattern})/.+")
_TAKEN, _BEYOND_THE_END, _UNKNOWN = 412, 416, 501


@dataclass(frozen=True)
class _Placed:
    """Where the files of a checkpoint lie."""

    attempt: str
    """By the manifest; empty where it does not say."""
    prefix: str
    """What stands before the names of files, below the name of the checkpoint."""
    sizes: dict[str, int]
    """Bytes by file."""


class ObjectStorage:
    """Checkpoints below a URL of fsspec, in a place of this run alone.

    Args:
        url: such as `s3://bucket/run/checkpoints`.
        options: how often and how patiently a request is tried.

    Raises:
        InputError: nothing can be written there, or a package is missing.
    """

    def __init__(self, url: str, options: StorageOptions | None = None) -> None:
        if MASK in url and masked(url) == url:
            raise InputError(
                f"checkpoint.folder = {url}: its password was masked where this was saved; leave "
                "passwords to the environment, and name the URL without it",
                key="checkpoint.folder",
            )
        self._connection, self._options = Connection(url), options or StorageOptions()
        if self._connection.is_web:
            raise InputError(
                f"checkpoint.folder = {url}: a web server takes no checkpoints; name a folder, or "
                "a URL such as s3://BUCKET/FOLDER",
                key="checkpoint.folder",
            )
        self._placed: dict[str, _Placed] = {}
        self._replaced: dict[str, bytes] = {}
        """Manifests that were there when a save of their name began: damaged, and passed over."""

    def where(self, name: str = "") -> str:
        return masked(self._connection.path(name))

    # -- writing ----------------------------------------------------------------------------------

    def begin(self, name: str, attempt: str, num_bytes: int) -> None:
        self._remove(f"{name}/{attempt}")  # of a save of this start that failed
        self._replaced.pop(name, None)
        with contextlib.suppress(FileNotFoundError):
            self._replaced[name] = self._get(f"{name}/{files.MANIFEST}")

    def create(self, name: str, attempt: str, file: str) -> NewFile:
        return _ObjectFile(self._connection, f"{name}/{attempt}/{file}")

    def publish(self, name: str, attempt: str, manifest: bytes) -> None:
        key, replaced = f"{name}/{files.MANIFEST}", self._replaced.pop(name, None)
        if replaced is not None:
            with contextlib.suppress(FileNotFoundError):
                # another one by now is that of another start, and stays
                if self._get(key) == replaced:
                    self._remove_keys([key])
        # an answer that was lost: what is there is ours
        if not self._put_new(key, manifest) and self._get(key) != manifest:
            raise StorageError(
                f"{self.where(key)}: another start of the run has published it; this one does not"
            )
        self._placed.pop(name, None)
        try:
            if replaced is not None:
                keys = self._list(name)
                self._remove_keys(k for k in keys if k != key and f"/{attempt}/" not in k)
            self._put(files.LATEST, f"{name}\n".encode())
        except (OSError, StorageError) as error:  # costs no save
            logger.warning("%s", error)

    def abandon(self, name: str, attempt: str) -> None:
        try:
            # what failed may have been what comes after publishing
            if self._attempt_of(name) != attempt:
                self._remove(f"{name}/{attempt}")
        except (OSError, StorageError) as error:
            logger.warning("%s", error)

    def remove(self, name: str, attempt: str) -> None:
        self._placed.pop(name, None)
        self._remove_keys([f"{name}/{files.MANIFEST}"])
        self._remove(name)

    def tidy(self) -> list[str]:
        # a run is held by one start at a time: nobody is writing when a start begins
        try:
            keys, by_attempt = self._list(), dict[str, dict[str, list[str]]]()
            for key in keys:
                if match := _FILE.fullmatch(key):
                    attempts = by_attempt.setdefault(match["name"], {})
                    attempts.setdefault(match["attempt"], []).append(key)
            for name, attempts in by_attempt.items():
                published = None
                if f"{name}/{files.MANIFEST}" in keys:
                    # not read at each start where there is no choice
                    published = self._attempt_of(name) if len(attempts) > 1 else ""
                for attempt, litter in attempts.items():
                    if published not in (attempt, ""):
                        self._remove_keys(litter)
            self._abort_uploads("")
        except (OSError, StorageError) as error:
            return [str(error)]
        return []

    def _attempt_of(self, name: str) -> str | None:
        """Who published a checkpoint; None for nobody, empty where its manifest does not say."""
        try:
            return _attempt_in(self._get(f"{name}/{files.MANIFEST}"))
        except FileNotFoundError:
            return None

    # -- reading ----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        found = [match[1] for key in self._list() if (match := _MANIFEST.fullmatch(key))]
        return sorted(found, reverse=True)

    def manifest(self, name: str) -> bytes:
        content = self._get(f"{name}/{files.MANIFEST}")
        attempt, prefix = _attempt_in(content), ""
        listed = {key.removeprefix(f"{name}/"): size for key, size in self._list(name).items()}
        if any(key.startswith(f"{attempt}/") for key in listed):
            prefix = f"{attempt}/"
        sizes = {
            key.removeprefix(prefix): size
            for key, size in listed.items()
            if key.startswith(prefix) and "/" not in key.removeprefix(prefix)
        }
        self._placed[name] = _Placed(attempt, prefix, sizes)
        return content

    def _place(self, name: str) -> _Placed:
        if name not in self._placed:
            self.manifest(name)
        return self._placed[name]

    def size(self, name: str, file: str) -> int:
        placed = self._place(name)
        if file not in placed.sizes:
            url = self.where(f"{name}/{placed.prefix}{file}")
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
        return placed.sizes[file]

    def read(self, name: str, file: str, start: int, into: memoryview) -> int:
        expected = max(0, min(len(into), self.size(name, file) - start))
        if not expected:
            return 0

        def get(system: Any, path: str) -> bytes:
            end = start + expected
            try:
                content = within_patience(
                    lambda: system.cat_file(path, start=start, end=end), expected
                )
            except OSError as error:
                if _says(error) != _BEYOND_THE_END:
                    raise
                content = b""
            if len(content) != expected:
                raise OSError(f"{len(content):,} of {expected:,} bytes arrived")
            return content

        content = self._try(f"{name}/{self._place(name).prefix}{file}", get)
        into[:expected] = content
        return expected

    def pins(self) -> set[str]:
        try:
            return set(self._get(PINS).decode(errors="replace").split())
        except FileNotFoundError:
            return set()

    def set_pins(self, pins: Iterable[str]) -> None:
        self._put(PINS, pins_text(pins))

    # -- requests ---------------------------------------------------------------------------------

    def _try(self, key: str, act: Callable[[Any, str], Result], done: str = "read") -> Result:
        def attempt() -> Result:
            with self._connection.to(key) as (system, path):
                return act(system, path)

        what = self._connection.path(key)
        try:
            return with_retries(attempt, what, self._options, (Exception,), done)
        except InputError as error:
            raise StorageError(str(error)) from error

    def _get(self, key: str) -> bytes:
        return self._try(key, lambda system, path: within_patience(lambda: system.cat_file(path)))

    def _put(self, key: str, content: bytes) -> None:
        def put(system: Any, path: str) -> None:
            within_patience(lambda: system.pipe_file(path, content), len(content))

        self._try(key, put, "written")

    def _put_new(self, key: str, content: bytes) -> bool:
        """Puts an object where there is none; whether there was none."""

        def put(system: Any, path: str) -> bool:
            try:
                within_patience(
                    lambda: system.pipe_file(path, content, mode="create"), len(content)
                )
            except Exception as error:
                if isinstance(error, FileExistsError) or _says(error) == _TAKEN:
                    return False
                if _says(error) != _UNKNOWN:
                    raise
                # a store without conditions: the owner of the run folder is the fence
                if within_patience(lambda: system.exists(path)):
                    return False
                within_patience(lambda: system.pipe_file(path, content), len(content))
            return True

        return self._try(key, put, "written")

    def _list(self, folder: str = "") -> dict[str, int]:
        """Bytes of all objects below a folder, by key."""

        def find(system: Any, path: str) -> dict[str, int]:
            try:
                found = within_patience(lambda: system.find(path, detail=True), _LISTING_BYTES)
            except FileNotFoundError as error:
                bucket = path.strip("/").partition("/")[0]
                if within_patience(lambda: system.exists(bucket)):
                    return {}
                raise StorageError(
                    f"{self.where()}: there is no {bucket}; make it, or name another place in "
                    "checkpoint.folder"
                ) from error
            return {
                f"{folder}/{name.removeprefix(path).lstrip('/')}".lstrip("/"): entry["size"]
                for name, entry in found.items()
                if entry["type"] == "file"
            }

        return self._try(folder, find, "listed")

    def _remove(self, folder: str) -> None:
        """Removes all below a folder, and what was being uploaded to it."""
        self._remove_keys(self._list(folder))
        self._abort_uploads(folder)

    def _remove_keys(self, keys: Iterable[str]) -> None:
        listed = list(keys)

        def remove(system: Any, path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                within_patience(
                    lambda: system.rm([f"{path}/{key}" for key in listed]), _LISTING_BYTES
                )

        if listed:
            self._try("", remove, "removed from")

    def _abort_uploads(self, folder: str) -> None:
        """Frees the parts of uploads that nobody will complete, which are listed nowhere else."""

        def abort(system: Any, path: str) -> None:
            call = getattr(system, "call_s3", None)
            if call is None:  # others forget such parts by themselves
                return
            bucket, _, prefix = path.partition("/")
            prefix, page = f"{prefix}/" if prefix else "", dict[str, Any]()
            root = prefix.removesuffix(f"{folder}/") if folder else prefix
            while True:
                marks = {key: page[f"Next{key}"] for key in ("KeyMarker", "UploadIdMarker") if page}
                page = call("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marks)
                for upload in page.get("Uploads", ()):
                    if _FILE.fullmatch(upload["Key"].removeprefix(root)):
                        with contextlib.suppress(FileNotFoundError):
                            system.abort_mpu(bucket, upload["Key"], upload["UploadId"])
                if not page.get("IsTruncated"):
                    return

        self._try(
            folder, lambda system, path: within_patience(lambda: abort(system, path)), "freed"
        )


class _ObjectFile:
    """An object that is uploaded in parts; the file system tries a part again by itself."""

    def __init__(self, connection: Connection, key: str) -> None:
        self._connection, self._key = connection, key
        self._file: Any = self._upload(
            lambda system, path: system.open(path, "wb", block_size=PART_BYTES)
        )

    def _upload(self, act: Callable[[Any, str], Result], num_bytes: int = 0) -> Result:
        try:
            with self._connection.to(self._key) as (system, path):
                return within_patience(lambda: act(system, path), num_bytes)
        except Exception as error:
            url = self._connection.path(self._key)
            reason = masked_in(" ".join(str(error).split()), url) or type(error).__name__
            raise StorageError(f"{url}: cannot be written ({reason}); check the storage") from error

    def write(self, block: memoryview | bytes) -> None:
        self._upload(lambda *_: self._file.write(block), PART_BYTES)

    def finish(self) -> None:
        self._upload(lambda *_: self._file.close(), PART_BYTES)

    def abandon(self) -> None:
        def drop(system: Any, path: str) -> None:
            with contextlib.suppress(AttributeError):
                self._file.closed = True  # else the collector of garbage would complete it
            self._file.discard()
            system.rm_file(path)

        with contextlib.suppress(StorageError):  # `tidy` finds it
            self._upload(drop)


def _attempt_in(manifest: bytes) -> str:
    """The attempt that a manifest names, whatever else is wrong with it; empty for none."""
    try:
        attempt = json.loads(manifest)["attempt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return attempt if isinstance(attempt, str) and _ATTEMPT.fullmatch(attempt) else ""


def _says(error: BaseException) -> object:
    """The status of HTTP that an exception or its cause bears."""
    return status_of(error) or (status_of(error.__cause__) if error.__cause__ else None)
