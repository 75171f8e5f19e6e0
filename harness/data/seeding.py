"""Seeds as lm-eval's `simple_evaluate` sets them, so that shots are the same in every process.

Python, numpy and torch are seeded inside a `with` block only: what trains outside it keeps its own
random numbers.
"""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np


@contextmanager
def seeded_as_lm_eval() -> Iterator[None]:
    """Seed every generator as lm-eval does before it loads tasks; restore them at the end."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with ExitStack() as stack:
            if "torch" in sys.modules:
                import torch

                devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
                stack.enter_context(torch.random.fork_rng(devices=list(devices)))
                torch.manual_seed(DEFAULT_OTHER_SEED)
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def prepare_tasks(tasks: Iterable[Any]) -> None:
    """Set what `simple_evaluate` sets on tasks before it evaluates them.

    No shots where a task states none, and the seed of the shots.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for task in tasks:
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
