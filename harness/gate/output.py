"""What a check found, in the forms that people and machines read: text, Markdown, JUnit XML, JSON,
annotations of a CI log. No torch.
"""

import json
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from harness.escape import clean, clean_all, markdown_cell, markdown_text
from harness.files.writing import finite
from harness.gate.rules import GRAVEST, Checked, Finding, Verdict
from harness.records import columns

_MARKS = {one: one.value for one in Verdict} | {
    Verdict.regressed: "REGRESSED",
    Verdict.missed: "MISSED",
}
_HEADERS = [
    one.header for one in (columns.VERDICT, columns.ROW, columns.TASK, columns.LAYER, columns.WHY)
]
_FAILED = (Verdict.regressed, Verdict.missed)


def _sorted(checked: Checked) -> list[Finding]:
    return sorted(
        checked.findings,
        key=lambda one: (GRAVEST.index(one.verdict), not one.counts, one.row, one.task, one.layer),
    )


def _said(one: Finding) -> str:
    told = f"{one.told} (differs: {one.differs})" if one.differs else one.told
    told += "" if one.counts else " (information: it does not count)"
    return clean(told)  # a reason may hold a terminal's colours, which no XML takes


def summary(checked: Checked) -> str:
    """Return the verdict in one line, with how many findings stand behind it."""
    counts = {
        verdict: sum(one.verdict is verdict and one.counts for one in checked.findings)
        for verdict in GRAVEST
    }
    told = (
        ", ".join(
            f"{count} {_MARKS[verdict].lower()}" for verdict, count in counts.items() if count
        )
        or "nothing was checked"
    )
    silent = sum(not one.counts for one in checked.findings)
    return (
        f"{checked.verdict.value}: "
        f"{told}{f'; {silent} undecided findings do not count' if silent else ''}"
    )


def text(checked: Checked) -> str:
    """Return the findings for a terminal, gravest first, the verdict last and under it what
    *passed* means.
    """
    from tabulate import tabulate

    rows = [
        [_MARKS[one.verdict], clean(one.row), clean(one.task or "-"), one.layer, _said(one)]
        for one in _sorted(checked)
    ]
    table = (
        tabulate(rows, headers=_HEADERS, tablefmt="plain", disable_numparse=True) if rows else ""
    )
    notes = [clean(f"note: {note}") for note in checked.notes]
    warned = [clean(f"warning: {one.name}: {one.told}") for one in _sorted(checked) if one.warning]
    lost = [
        f"items lost: {clean(one.name)}: "
        f"{', '.join(map(str, one.items[:20]))}{' ...' if len(one.items) > 20 else ''}"
        for one in _sorted(checked)
        if one.verdict is Verdict.regressed and one.items
    ]
    return "\n".join(
        part
        for part in (table, *warned, *lost, *notes, f"\n{summary(checked)}", checked.passed_means)
        if part
    )


def markdown(checked: Checked) -> str:
    """Return the findings as Markdown, for a job's summary."""
    from tabulate import tabulate

    marks = {
        one: f"**{mark}**" if one is not Verdict.passed else mark for one, mark in _MARKS.items()
    }
    rows = [
        [marks[one.verdict], *map(markdown_cell, (one.row, one.task or "-", one.layer, _said(one)))]
        for one in _sorted(checked)
    ]
    table = tabulate(rows, headers=_HEADERS, tablefmt="pipe", disable_numparse=True)
    notes = "".join(f"- {markdown_text(note)}\n" for note in checked.notes)
    means = f"{markdown_cell(checked.passed_means)}\n\n" if checked.passed_means else ""
    return (
        "### compression-harness: "
        f"{summary(checked)}\n\n{means}{table}\n\n{notes}{_rules(checked)}\n"
    )


def _rules(checked: Checked) -> str:
    rules = checked.rules
    told = (
        [f"claim: {rules.claim()} (of choices: above chance), one-sided alpha {rules.alpha:g}"]
        if rules.margin is not None
        else []
    )
    told.append(
        f"frozen: exact McNemar, alpha {rules.frozen_alpha:g}, tolerance {100 * rules.tolerance:g} "
        "points, must be able to show "
        f"{100 * rules.detect:g} points; Holm over rows, tasks and pools"
    )
    return f"- Rules: {'; '.join(told)}."


def junit(checked: Checked) -> str:
    """Return the findings as JUnit XML: a test case each; regressed and missed fail, not comparable
    is an error, cannot tell is skipped.
    """
    failed, errors, skipped = (
        sum(one.verdict in verdicts for one in checked.findings)
        for verdicts in (_FAILED, (Verdict.not_comparable,), (Verdict.cannot_tell,))
    )
    suite = ElementTree.Element(
        "testsuite",
        name="compression-harness",
        tests=str(len(checked.findings)),
        failures=str(failed),
        errors=str(errors),
        skipped=str(skipped),
    )
    tags = {
        Verdict.regressed: "failure",
        Verdict.missed: "failure",
        Verdict.not_comparable: "error",
        Verdict.cannot_tell: "skipped",
    }
    for one in _sorted(checked):
        name = clean(f"{one.task or 'row'} [{one.layer}]")
        case = ElementTree.SubElement(
            suite, "testcase", classname=clean(f"harness.{one.row}").replace(" ", "_"), name=name
        )
        if one.verdict in tags:
            ElementTree.SubElement(
                case, tags[one.verdict], message=_said(one), type=one.verdict.value
            )
        ElementTree.SubElement(case, "system-out").text = _said(one)
    ElementTree.indent(suite)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        + ElementTree.tostring(suite, encoding="unicode")
        + "\n"
    )


def as_json(checked: Checked) -> str:
    """Return everything as JSON."""
    return (
        json.dumps(
            clean_all(finite(checked.as_dict())),
            indent=1,
            ensure_ascii=False,
            default=str,
            allow_nan=False,
        )
        + "\n"
    )


def annotations(checked: Checked) -> Sequence[str]:
    """Return GitHub's workflow commands: an error for what regressed, missed or cannot be compared,
    a warning for what cannot be told.

    What cannot be told and does not count is a notice.
    """
    kinds: Mapping[Verdict, str] = {
        **dict.fromkeys(_FAILED, "error"),
        Verdict.not_comparable: "error",
        Verdict.cannot_tell: "warning",
    }

    def escaped(words: str) -> str:
        return clean(words).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    def title(one: Finding) -> str:
        return escaped(f"{one.name}: {one.verdict.value}").replace(":", "%3A").replace(",", "%2C")

    told = [one for one in _sorted(checked) if one.verdict in kinds]
    warned = [one for one in _sorted(checked) if one.warning and one.verdict is Verdict.passed]
    return [
        f"::{kinds[one.verdict] if one.counts else 'notice'} "
        f"title={title(one)}::{escaped(_said(one))}"
        for one in told
    ] + [f"::warning title={title(one)}::{escaped(one.told)}" for one in warned]
