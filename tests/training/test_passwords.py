"""A password in the URL of a source is in nothing that a run prints, logs or saves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from data_pipeline.errors import InputError
from megadlcm.checkpoint.load_model import load_model
from megadlcm.commands.main import main
from megadlcm.config import RunConfig, load_config
from megadlcm.run_folder.rows import read_rows
from megadlcm.training import pretrain


class GuardedFiles(LocalFileSystem):  # type: ignore[misc]
    """Local files for who names a user and a password; says both in what it raises."""

    protocol = "guarded"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        user, _, rest = str(path).removeprefix("guarded://").partition("@host")
        if user not in ("ada:fi/r?st-secret", "ada:other-secret"):
            return str(path)  # what was stripped before
        return rest.rstrip("/")

    def info(self, path: str, **options: Any) -> Any:
        try:
            return super().info(path, **options)
        except FileNotFoundError as error:
            raise OSError(f"guarded://ada:fi/r?st-secret@host{path} is not there") from error


fsspec.register_implementation("guarded", GuardedFiles, clobber=True)


@pytest.fixture
def shards(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


def guarded(folder: Path, secret: str) -> list[dict[str, Any]]:
    return [{"path": f"guarded://ada:{secret}@host{folder}", "weight": 1.0}]


def secrets_in(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and b"-secret" in path.read_bytes()
    }


def test_a_password_is_nowhere_and_may_change(
    make_run: Callable[..., RunConfig],
    shards: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(secret: str, steps: int) -> RunConfig:
        data = {
            "train": guarded(shards / "train", secret),
            "valid": guarded(shards / "valid", secret),
            "cache_dir": str(tmp_path / "copies"),
        }
        training = {"train_steps": steps}
        return make_run(data=data, training=training, checkpoint={"interval_steps": 2})

    config = run("fi/r?st-secret", 2)
    folder = Path(config.output_dir)
    assert pretrain.run(config) == 0
    assert secrets_in(folder) == secrets_in(tmp_path / "copies") == set()
    # and it was read by that URL, which the saved config names without the password
    saved = (folder / "config.yaml").read_text()
    assert f"guarded://ada:***@host{shards}/train" in saved
    assert (tmp_path / "copies").exists()
    load_model(folder)
    # another password is no other data
    caplog.clear()
    assert pretrain.run(run("other-secret", 4)) == 0
    assert [row["step"] for row in read_rows(folder) if "loss" in row] == [1, 2, 3, 4]
    assert "config change on resume: data." not in caplog.text
    assert secrets_in(folder) == set()
    # the saved config alone cannot read, and says why
    with pytest.raises(InputError, match=r"password was masked where this was saved"):
        pretrain.run(load_config(folder / "config.yaml"))
    # what goes wrong is told without it as well
    next((shards / "train").glob("*.tar")).unlink()
    shutil.rmtree(tmp_path / "copies")
    for path in (shards / "train").glob("*.npz"):
        path.unlink()
    with pytest.raises((InputError, RuntimeError)) as caught:
        pretrain.run(run("fi/r?st-secret", 6))
    assert "guarded://ada:***@host" in str(caught.value)
    printed = "".join(capfd.readouterr())
    assert "holds a password" in printed
    assert "-secret" not in printed + caplog.text + str(caught.value)
    assert secrets_in(folder) == set()


def test_commands_on_a_folder_do_not_show_its_password(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = guarded(shards / "train", "other-secret")[0]["path"]
    cache = ["--cache-dir", str(tmp_path / "copies")]
    shown = f"guarded://ada:***@host{shards}/train"
    commands = (["inspect", url], ["verify", url, *cache], ["preview", url, *cache])
    for words in commands:
        assert main(["data", *words]) == 0
        printed = "".join(capfd.readouterr())
        assert shown in printed and "-secret" not in printed
    # damage, of which a line tells each time
    damaged = next((shards / "train").glob("*.documents.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["data", "verify", url, *cache]) == 2
    printed = "".join(capfd.readouterr())
    assert f"{shown}/{damaged.name}" in printed and "-secret" not in printed
