"""What was measured of a row: means over its seeds, and speeds with their intervals. No torch."""

from statistics import fmean

from harness.analysis.comparison import ResultRow
from harness.statistics import stats
from harness.statistics.intervals import Interval


def mean_measurement(row: ResultRow | None, name: str) -> float | None:
    """Return a measurement's mean over a row's seeds, None where it was not measured."""
    values = [
        measurement.value
        for record in (row.succeeded if row else ())
        if (measurement := record.measurement(name)) is not None
    ]
    return fmean(values) if values else None


def speed_ratio(row: ResultRow, name: str) -> Interval:
    """Return a row's speed ratio with its interval.

    The interval of one record is that of its rounds; of several records it is taken over the seeds.
    """
    measurements = [
        measurement
        for record in row.succeeded
        if (measurement := record.measurement(name)) is not None
    ]
    if not measurements:
        return Interval(None, reason="not measured")
    if len(measurements) == 1:
        return Interval(measurements[0].value, measurements[0].low, measurements[0].high)
    return stats.ratio_of_rounds([measurement.value for measurement in measurements])


def scenario_ratios(row: ResultRow, name: str) -> dict[str, Interval]:
    """Return a row's ratio with its interval by the scenario that it was timed in.

    The interval of one record is that of its rounds; of several records it is taken over the seeds.
    """
    measurements = [
        measurement
        for record in row.succeeded
        for measurement in record.measurements
        if measurement.name == name
    ]
    ratios = {}
    for condition in dict.fromkeys(measurement.condition for measurement in measurements):
        alike = [part for part in measurements if part.condition == condition]
        if len(alike) == 1:
            ratios[condition] = Interval(alike[0].value, alike[0].low, alike[0].high)
        else:
            ratios[condition] = stats.ratio_of_rounds([part.value for part in alike])
    return ratios
