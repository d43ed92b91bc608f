"""The door: from a path or a URL to the storage of the folder there."""

from __future__ import annotations

from data_pipeline.errors import InputError
from data_pipeline.masking import MASK, is_remote, is_url, masked
from data_pipeline.storage.interface import Location, Storage, StorageOptions
from data_pipeline.storage.local import LocalFolder


def open_storage(location: Location, options: StorageOptions | None = None) -> Storage:
    """Returns the storage of a folder or URL; looks at nothing yet.

    Raises:
        InputError: a URL of a kind that is not known or not installed, or one without its password.
    """
    options = options or StorageOptions()
    text = str(location)
    if MASK in text and masked(text) == text and is_url(text):
        raise InputError(
            f"{text}: its password was masked where this was saved; name the URL again, for a run "
            "as data.train=[{path: URL}], or leave passwords to ~/.netrc or the environment"
        )
    if is_remote(text):
        # fsspec takes longer to load than all the rest of reading: not for who reads a path
        from data_pipeline.storage.remote_folder import RemoteFolder

        return RemoteFolder(text, options)
    return LocalFolder(text.removeprefix("file://"), options)
