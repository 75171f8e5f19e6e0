"""Keys and values of the cache in int8 or int4; the weights stay as they are.

`kv-int8`: a scale for a group of 64 channels of each token and head, symmetric. `kv-int4`: a scale
and an offset for a group of 32 channels, as KIVI stores values (Liu et al., 2024, arXiv
2402.02750). KIVI groups the codes of keys over 32 tokens instead, and keeps the newest tokens in
full: what is stored of a token then depends on the tokens beside it, and short prompts are not
quantized at all. Per token, an answer depends on no batch, and a text is scored as it is decoded.
KIVI needs its groups at 2 bits, where single channels of keys are large; none is offered here.

Cost: none to make; a decoding step also decodes all codes. Fails where a few channels of a group
are much larger than the others; `kl_at_length` in the record says whether long prompts suffer more.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Family, Job
from methods.base import settings
from methods.compression.base import Compressed

if TYPE_CHECKING:
    from harness.models.cache_format import CacheFormat
    from harness.models.shape import Shape


@settings
class KvInt8(Compressed):
    """Keys and values in int8, one scale per group of channels of a token and head."""

    family: ClassVar[Family] = "cache"
    controls: ClassVar[tuple[str, ...]] = ("identity",)  # the same weights with the full cache
    _bits: ClassVar[Literal[4, 8]] = 8

    group_size: Annotated[int, Field(ge=8, le=1024)] = 64  # channels of a head that share a scale

    @property
    def cache_format(self) -> "CacheFormat":
        """What the student's configuration states."""
        from harness.models.cache_format import CacheFormat

        return CacheFormat(bits=self._bits, group=self.group_size)

    def resulting_shape(self, before: "Shape") -> "Shape":
        """The same shape, with this cache."""
        from dataclasses import replace

        return replace(before, cache=self.cache_format)

    def compress(self, job: Job) -> Checkpoint:
        """Copy the model's files, and state the format; refuse a model that cannot have it."""
        from methods.compression.cached import student_with_cache

        return student_with_cache(job, f"kv-int{self._bits}", self.cache_format)


@settings
class KvInt4(KvInt8):
    """Keys and values in int4, one scale and offset per group of channels of a token and head."""

    _bits: ClassVar[Literal[4, 8]] = 4

    group_size: Annotated[int, Field(ge=8, le=1024)] = (
        32  # channels that share a scale and an offset
    )
