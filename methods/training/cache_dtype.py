"""The number types in which a cache can keep a teacher's log-probabilities."""

from typing import Literal

# how a cache keeps log-probabilities (`cache_forms`)
CacheDtype = Literal["float32", "float16", "int8"]
