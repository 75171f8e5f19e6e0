"""Limits the time of code that came with a model, as a chat template may loop forever. No torch."""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeLimitExceeded(Exception):
    """Code ran longer than its time limit."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitExceeded` inside the `with` block after `seconds`.

    It is raised between two steps of Python code, never inside compiled code of a library.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        with _limit_by_alarm(seconds):
            yield
    else:
        with _limit_by_thread(seconds):
            yield


@contextmanager
def _limit_by_alarm(seconds: float) -> Iterator[None]:
    """Limit by the process's alarm clock, which only the main thread may use.

    An alarm that was running before continues afterwards.
    """

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeLimitExceeded

    previous_handler = signal.signal(signal.SIGALRM, over)
    previous_seconds, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, previous_seconds)
        signal.signal(signal.SIGALRM, previous_handler)


@contextmanager
def _limit_by_thread(seconds: float) -> Iterator[None]:
    """Limit by a second thread, which raises the exception in this one."""
    thread, lock = threading.get_ident(), threading.Lock()
    done = False

    def over() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(TimeLimitExceeded)
                )

    timer = threading.Timer(seconds, over)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done = True
        timer.cancel()
