"""One ratio a round: from the times of two models' tokens to how many times faster one is.

A visit is a list of runs, a run the times of its start and of its tokens in seconds. A round has
two visits of each model.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

Runs = Sequence[Sequence[float]]
Visits = Sequence[Runs]  # of one model


def lower_quartile(values: Sequence[float]) -> float:
    """Return the lower quartile (linear between ranks): what a run takes when nothing disturbs it.

    Others on the machine only ever add time, so low quantiles repeat where means do not (Chen and
    Revels, 2016, "Robust benchmarking in noisy environments", take the least); the least of all
    would rest on one lucky value.
    """
    ordered = sorted(values)
    position = 0.25 * (len(ordered) - 1)
    rank = int(position)
    lower, upper = ordered[rank], ordered[min(rank + 1, len(ordered) - 1)]
    return lower + (position - rank) * (upper - lower)


def token_gaps(runs: Runs) -> list[float]:
    """Return the seconds between tokens after the first one, over all runs."""
    return [later - earlier for times in runs for earlier, later in pairwise(times[1:])]


def speed_ratios(
    visits: Mapping[str, Visits], decoding: Mapping[str, Visits] | None = None
) -> dict[str, tuple[float, ...]]:
    """Return base's seconds over the student's, one ratio a round: prefill, decode, end_to_end.

    `decoding` are the visits whose steps count, where they are others (captured ones); the prefill
    is that of `visits`. Nothing is returned without a base.
    """
    if "base" not in visits:
        return {}
    rounds = {
        role: _rounds(model_visits, (decoding or visits)[role])
        for role, model_visits in visits.items()
    }
    return {
        name: tuple(
            base[name] / student[name]
            for base, student in zip(rounds["base"], rounds["student"], strict=True)
        )
        for name in ("prefill", "decode", "end_to_end")
    }


def _rounds(visits: Visits, decoding: Visits) -> list[dict[str, float]]:
    """Return a model's seconds in each round: lower quartiles over the runs of its visits."""
    seconds = []
    for index in range(0, len(visits), 2):
        prefill = lower_quartile(
            [times[1] for visit in visits[index : index + 2] for times in visit]
        )
        runs = [times for visit in decoding[index : index + 2] for times in visit]
        steps = max(len(times) for times in runs) - 2
        decode = lower_quartile(token_gaps(runs)) * steps
        seconds.append({"prefill": prefill, "decode": decode, "end_to_end": prefill + decode})
    return seconds
