"""How much a cut in width takes away. No torch: plans ask before anything is computed."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WidthReduction:
    """How many channels and heads go."""

    ratio: float  # of the feed-forward channels
    groups: int  # KV groups of every block
    multiple: int  # channels that stay, rounded to the nearest of it

    def kept_channels(self, width: int) -> int:
        """Return how many of so many channels stay: the share, rounded to the nearest multiple; all
        of them for a ratio of 0.
        """
        if not self.ratio:
            return width
        return min(width, int((1 - self.ratio) * width / self.multiple + 0.5) * self.multiple)
