"""Where tasks find their items, and the guard that keeps evaluation text out of training data.

No torch at import. The names below are public: methods and tasks of other packages import them from
here.
"""

from harness.data.contamination import contaminated_texts, overlapping_prompts
from harness.data.examples import examples_digest, examples_of, interleaved, training_examples
from harness.data.source import C4, LocalOrHubData, NoSplit
from harness.renames.modules import by_old_name

__all__ = [
    "C4",
    "LocalOrHubData",
    "NoSplit",
    "contaminated_texts",
    "examples_digest",
    "examples_of",
    "interleaved",
    "overlapping_prompts",
    "training_examples",
]

__getattr__ = by_old_name(__name__)
