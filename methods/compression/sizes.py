"""How many channels and head groups width pruning removes.

Plans ask this before anything is computed, so importing this module imports no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WidthReduction:
    """How many feed-forward channels and head groups are removed from every block."""

    ratio: float  # share of the feed-forward channels to remove
    groups: int  # KV groups to remove
    multiple: int  # the number of kept channels is rounded to the nearest multiple of it

    def kept_channels(self, width: int) -> int:
        """Return how many of `width` channels are kept; all of them at ratio 0."""
        if not self.ratio:
            return width
        return min(width, int((1 - self.ratio) * width / self.multiple + 0.5) * self.multiple)
