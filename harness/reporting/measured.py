"""What `harness measure` prints: models timed by turns, and what they weigh. No torch."""

from collections.abc import Sequence
from typing import NamedTuple

from harness.escape import markdown_cell, markdown_text
from harness.records import columns
from harness.records.columns import Quantity
from harness.records.record import Measurement
from harness.statistics.intervals import Interval


class ModelTimings(NamedTuple):
    """What was measured of one model: its name, its values, and the scenarios left out."""

    name: str
    measurements: Sequence[Measurement]
    skipped: Sequence[str]  # scenarios that were not timed, with the reason


_TIMED = (
    columns.TTFT,
    columns.TPOT,
    columns.GAP_P90,
    columns.PREFILL_RATE,
    columns.DECODE_RATE,
    columns.END_TO_END,
    columns.KV,
)
# Of a GPU, where some model has them.
_LAUNCHED = (columns.EAGER_TPOT, columns.EAGER_DECODE_X, columns.DECODE_BUSY, columns.PREFILL_BUSY)
_WEIGHED = (
    columns.DISK,
    columns.WEIGHTS,
    columns.KV_PER_TOKEN,
    columns.ACTIVATIONS,
    columns.LOAD,
    columns.FIRST_CALL,
)


def measurement_tables(models: Sequence[ModelTimings]) -> str:
    """Return what `harness measure` prints; the first model is the base of the ratios."""
    from tabulate import tabulate

    names = {measurement.name for model in models for measurement in model.measurements}
    launched = [quantity for quantity in _LAUNCHED if quantity.key in names]
    speed_lines = [
        line
        for number, model in enumerate(models)
        for line in _speed_lines(model, launched, is_base=number == 0)
    ]
    weight_lines = [_weight_line(model) for model in models]
    remarks = [remark for model in models for remark in _remarks(model)]
    if speed_lines and len(models) > 1:
        remarks.append(
            f"- A {columns.DECODE_X.header} above 1 is faster than the base. An interval that "
            "contains 1 shows no difference."
        )
    parts = [
        tabulate(lines, headers="keys", tablefmt="pipe", disable_numparse=True)
        for lines in (speed_lines, weight_lines)
        if lines
    ]
    if remarks:
        parts.append("\n".join(map(markdown_text, remarks)))
    return "\n\n".join(parts)


def _value_text(quantity: Quantity, measurement: Measurement | None) -> str:
    """Write a measurement with its interval, where it has one."""
    if measurement is None:
        return quantity.text(None)
    numbers = (measurement.value, measurement.low, measurement.high)
    value, low, high = map(quantity.scaled, numbers)
    return quantity.with_interval(Interval(value, low, high))


def _speed_lines(
    model: ModelTimings, launched: Sequence[Quantity], *, is_base: bool
) -> list[dict[str, str]]:
    """Return one line for each scenario that a model was timed in; `launched` stand at its end."""
    by_scenario = {
        (measurement.name, measurement.condition): measurement for measurement in model.measurements
    }
    rates = [
        measurement
        for measurement in model.measurements
        if measurement.name == columns.DECODE_RATE.key
    ]
    lines = []
    for scenario in dict.fromkeys(rate.condition for rate in rates):
        line = {
            columns.MODEL.header: markdown_cell(model.name),
            columns.SCENARIO.header: markdown_cell(scenario),
        }
        for quantity in _TIMED:
            line[quantity.header] = _value_text(quantity, by_scenario.get((quantity.key, scenario)))
        peaks = [
            by_scenario.get((f"{columns.PEAK.key}:{kind}", scenario))
            for kind in ("resident", "allocated")
        ]
        peak = next(filter(None, peaks), None)
        line[columns.MEASURED_PEAK.header] = _value_text(columns.MEASURED_PEAK, peak)
        for ratio in (columns.PREFILL_X, columns.DECODE_X):
            text = _value_text(ratio, by_scenario.get((ratio.key, scenario)))
            line[ratio.header] = "base" if is_base else text
        for quantity in launched:
            text = _value_text(quantity, by_scenario.get((quantity.key, scenario)))
            is_ratio = quantity is columns.EAGER_DECODE_X
            line[quantity.header] = "base" if is_ratio and is_base else text
        lines.append(line)
    return lines


def _weight_line(model: ModelTimings) -> dict[str, str]:
    """Return a model's line of bytes and of the seconds that opening it takes."""
    first = {measurement.name: measurement for measurement in reversed(model.measurements)}
    return {
        columns.MODEL.header: markdown_cell(model.name),
        **{
            quantity.header: _value_text(quantity, first.get(quantity.key)) for quantity in _WEIGHED
        },
    }


def _remarks(model: ModelTimings) -> list[str]:
    """Return a line for each doubtful measurement, and for each scenario that was not timed."""
    remarks = dict.fromkeys(
        (measurement.name.startswith("skipped_"), measurement.remark)
        for measurement in model.measurements
        if measurement.remark
    )
    lines = [
        f"- {model.name}: {'' if is_skipped else 'doubtful: '}{remark}"
        for is_skipped, remark in remarks
    ]
    return [*lines, *(f"- {model.name}: skipped: {reason}" for reason in model.skipped)]
