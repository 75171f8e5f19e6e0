"""Bounds the time of code that came with a model: a chat template may loop for ever. No torch."""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeLimitExceeded(Exception):
    """Code that was given a time took longer."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TooLong` inside the block once it has run for `seconds`: between two steps of Python
    code, never inside a library's own.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        with _limit_by_alarm(seconds):
            yield
    else:
        with _limit_by_thread(seconds):
            yield


@contextmanager
def _limit_by_alarm(seconds: float) -> Iterator[None]:
    """Bound by the process's alarm clock, which belongs to the main thread; one that was running
    goes on behind the block.
    """

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeLimitExceeded

    before = signal.signal(signal.SIGALRM, over)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _limit_by_thread(seconds: float) -> Iterator[None]:
    """Bound by a second thread, which raises in this one."""
    mine, open_ = threading.get_ident(), threading.Lock()
    done = False

    def over() -> None:
        with open_:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(mine), ctypes.py_object(TimeLimitExceeded)
                )

    timer = threading.Timer(seconds, over)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with open_:
            done = True
        timer.cancel()
