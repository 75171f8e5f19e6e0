"""What `harness measure` prints: models timed by turns, and what they weigh. No torch."""

from collections.abc import Sequence

from harness.escape import markdown_cell, markdown_text
from harness.records import columns
from harness.records.columns import Quantity
from harness.records.record import Measurement
from harness.statistics.intervals import Interval

_MeasuredModel = tuple[
    str, Sequence[Measurement], Sequence[str]
]  # name, measurements, skipped scenarios
_TIMED = (
    columns.TTFT,
    columns.TPOT,
    columns.GAP_P90,
    columns.PREFILL_RATE,
    columns.DECODE_RATE,
    columns.END_TO_END,
    columns.KV,
)
_WEIGHED = (columns.DISK, columns.WEIGHTS, columns.ACTIVATIONS, columns.LOAD, columns.FIRST_CALL)


def measurement_tables(models: Sequence[_MeasuredModel]) -> str:
    """Return what `harness measure` prints of each model, the first one the base."""
    from tabulate import tabulate

    timed = [
        row
        for at, (name, measured, _) in enumerate(models)
        for row in _speed_lines(name, measured, is_base=at == 0)
    ]
    weighed = [_weight_line(name, measured) for name, measured, _ in models]
    lines = [line for model in models for line in _remarks(*model)]
    parts = [
        tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)
        for rows in (timed, weighed)
        if rows
    ]
    if timed and len(models) > 1:
        lines.append(
            f"- A {columns.DECODE_X.header} above 1 is faster than the base; an interval that "
            "holds 1 shows no difference."
        )
    return (
        "\n\n".join([*parts, "\n".join(map(markdown_text, lines))]) if lines else "\n\n".join(parts)
    )


def _shown(quantity: Quantity, measurement: Measurement | None) -> str:
    """Write a measurement with its interval, where it has one."""
    if measurement is None:
        return quantity.text(None)
    value, low, high = (
        quantity.scaled(number) for number in (measurement.value, measurement.low, measurement.high)
    )
    return quantity.with_interval(Interval(value, low, high))


def _speed_lines(
    name: str, measured: Sequence[Measurement], *, is_base: bool
) -> list[dict[str, str]]:
    """Return a line for each scenario that a model was timed in."""
    known = {(one.name, one.condition): one for one in measured}
    rows = []
    for condition in dict.fromkeys(
        one.condition for one in measured if one.name == columns.DECODE_RATE.key
    ):
        row = {
            columns.MODEL.header: markdown_cell(name),
            columns.SCENARIO.header: markdown_cell(condition),
        }
        row |= {one.header: _shown(one, known.get((one.key, condition))) for one in _TIMED}
        peaks = (
            known.get((f"{columns.PEAK.key}:{kind}", condition))
            for kind in ("resident", "allocated")
        )
        row[columns.MEASURED_PEAK.header] = _shown(
            columns.MEASURED_PEAK, next(filter(None, peaks), None)
        )
        for ratio in (columns.PREFILL_X, columns.DECODE_X):
            row[ratio.header] = (
                "base" if is_base else _shown(ratio, known.get((ratio.key, condition)))
            )
        rows.append(row)
    return rows


def _weight_line(name: str, measured: Sequence[Measurement]) -> dict[str, str]:
    """Return a model's line of bytes and of opening it."""
    first = {one.name: one for one in reversed(measured)}
    return {
        columns.MODEL.header: markdown_cell(name),
        **{one.header: _shown(one, first.get(one.key)) for one in _WEIGHED},
    }


def _remarks(name: str, measured: Sequence[Measurement], skipped: Sequence[str]) -> list[str]:
    """Say which measurements are doubtful, and what was not timed."""
    remarks = dict.fromkeys(
        (one.name.startswith("skipped_"), one.remark) for one in measured if one.remark
    )
    doubtful = [
        f"- {name}: {'' if without else 'doubtful: '}{remark}" for without, remark in remarks
    ]
    return [*doubtful, *(f"- {name}: skipped: {reason}" for reason in skipped)]
