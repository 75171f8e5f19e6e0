"""The seeds that lm-eval's `simple_evaluate` sets around a task, so that its shots and shuffles are
the same in every process.

Python, numpy and torch are seeded for the time of a `with` block only: what trains beside it keeps
its own streams.
"""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np


@contextmanager
def seeded_as_lm_eval() -> Iterator[None]:
    """Seed every generator as lm-eval does before it loads tasks; put the states back at
    the end.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    ours, numpys = random.getstate(), np.random.get_state()
    try:
        with ExitStack() as stack:
            if "torch" in sys.modules:
                import torch

                known = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
                stack.enter_context(torch.random.fork_rng(devices=list(known)))
                torch.manual_seed(DEFAULT_OTHER_SEED)
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


def prepare_tasks(tasks: Iterable[Any]) -> None:
    """Do to tasks what `simple_evaluate` does before it evaluates them: no shots where none are
    stated, and the seed of the shots.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for task in tasks:
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
