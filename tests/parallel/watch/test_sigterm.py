"""SIGTERM is answered by a thread, and by nobody's parent."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from megadlcm.parallel.watch.sigterm import SigtermListener


@pytest.fixture(autouse=True)
def keep_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Answers:
    """Who answered, and how often."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.came = threading.Event()
        self.listener = SigtermListener(self)

    def __call__(self) -> None:
        self.threads.append(threading.current_thread().name)
        self.came.set()


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_a_thread_answers_and_what_was_there_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    answers = Answers()
    answers.listener.start()
    thread = threads_named("sigterm")[-1]
    for count in (1, 2):
        answers.came.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        assert answers.came.wait(60.0) and len(answers.threads) == count
    assert set(answers.threads) == {"sigterm"}
    answers.listener.stop()
    thread.join(60.0)
    assert not thread.is_alive() and signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1
    answers.listener.stop()  # twice is once


def test_other_signals_are_not_for_it() -> None:
    answers = Answers()
    handled = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: handled.set())
    answers.listener.start()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert handled.wait(60.0)
    os.kill(os.getpid(), signal.SIGTERM)  # behind the other one in the pipe
    assert answers.came.wait(60.0)
    answers.listener.stop()
    assert answers.threads == ["sigterm"]


def test_a_forked_child_ends_by_its_sigterm_and_its_parent_does_not_hear_of_it() -> None:
    answers = Answers()
    answers.listener.start()
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert answers.threads == []
    answers.listener.stop()


def test_only_the_main_thread_can_listen() -> None:
    before, threads = signal.getsignal(signal.SIGTERM), threads_named("sigterm")
    answers = Answers()
    thread = threading.Thread(target=answers.listener.start)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert set(threads_named("sigterm")) <= set(threads)
