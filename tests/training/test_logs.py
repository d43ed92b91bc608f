"""A log has a line for each message, whatever the names in it, and tracebacks below theirs."""

from __future__ import annotations

import logging
from pathlib import Path

from megadlcm.parallel.process_group import join_process_group
from megadlcm.run_folder import files
from megadlcm.training.logs import rank_log
from tests.support.tiny_runs import tiny_run


def test_a_message_is_one_line(tmp_path: Path) -> None:
    """A domain called so would forge another, or move the cursor of who reads the log."""
    config = tiny_run(tmp_path, tmp_path)
    with rank_log(config, join_process_group(config.parallel)):
        logger = logging.getLogger("megadlcm.test")
        logger.info("domain %s", "web\x1b[2J\nrank 0 forged\u202e")
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            logger.exception("failed")
        logger.info("last")
    log = tmp_path / files.LOGS / files.rank_log(0)
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines[0].endswith("megadlcm.test: domain web\\x1b[2J\\nrank 0 forged\\u202e")
    assert lines[1].endswith("ERROR megadlcm.test: failed")
    assert lines[2] == "Traceback (most recent call last):"
    assert lines[-2] == "second" and lines[-1].endswith("last")


def test_a_password_is_not_in_the_log_either_way(tmp_path: Path) -> None:
    """Not in a message, nor in a traceback below it."""
    config = tiny_run(tmp_path, tmp_path)
    with rank_log(config, join_process_group(config.parallel)):
        try:
            raise ValueError("ftp://ada:secret@host/a")
        except ValueError:
            logging.getLogger("megadlcm.test").exception("http://ada:secret@host/a failed")
    text = (tmp_path / files.LOGS / files.rank_log(0)).read_text(encoding="utf-8")
    assert "http://***@host/a failed" in text and "ValueError: ftp://ada:***@host/a" in text
    assert "secret@" not in text
