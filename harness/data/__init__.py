"""Where tasks find their items, and the guard that keeps evaluation text out of training data. No
torch at import.

The names below are public: methods and tasks of other packages import them from here.
"""

from harness.data.contamination import contaminated, overlapping
from harness.data.examples import examples_digest, examples_of, interleaved, training_examples
from harness.data.source import C4, DataSource, NoSplit

__all__ = [
    "C4",
    "DataSource",
    "NoSplit",
    "contaminated",
    "examples_digest",
    "examples_of",
    "interleaved",
    "overlapping",
    "training_examples",
]
