"""The result of a check as text, Markdown, JUnit XML, JSON or annotations. No torch."""

import json
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from harness.escape import clean, clean_all, markdown_cell, markdown_text
from harness.files.writing import nonfinite_as_null
from harness.gate.rules import GRAVEST_FIRST, CheckResult, Finding, Verdict
from harness.records import columns

_VERDICT_WORDS = {verdict: verdict.value for verdict in Verdict} | {
    Verdict.regressed: "REGRESSED",
    Verdict.missed: "MISSED",
}
_HEADERS = [
    column.header
    for column in (columns.VERDICT, columns.ROW, columns.TASK, columns.LAYER, columns.WHY)
]
_FAILED = (Verdict.regressed, Verdict.missed)


def _gravest_first(result: CheckResult) -> list[Finding]:
    return sorted(
        result.findings,
        key=lambda finding: (
            GRAVEST_FIRST.index(finding.verdict),
            not finding.counts,
            finding.row,
            finding.task,
            finding.layer,
        ),
    )


def _line_of(finding: Finding) -> str:
    """Return a finding's explanation, with what differs and whether it counts."""
    line = finding.told
    if finding.differs:
        line += f" (differs: {finding.differs})"
    if not finding.counts:
        line += " (information: it does not count)"
    return clean(line)  # a reason may hold a terminal's colours, which XML does not allow


def summary(result: CheckResult) -> str:
    """Return the verdict in one line, with the number of findings of each verdict."""
    counted = [finding.verdict for finding in result.findings if finding.counts]
    numbers = ", ".join(
        f"{counted.count(verdict)} {_VERDICT_WORDS[verdict].lower()}"
        for verdict in GRAVEST_FIRST
        if verdict in counted
    )
    line = f"{result.verdict.value}: {numbers or 'nothing was checked'}"
    uncounted = len(result.findings) - len(counted)
    return f"{line}; {uncounted} undecided findings do not count" if uncounted else line


def terminal_text(result: CheckResult) -> str:
    """Return the findings for a terminal: gravest first, then the verdict and what a pass means."""
    from tabulate import tabulate

    findings = _gravest_first(result)
    rows = [
        [
            _VERDICT_WORDS[finding.verdict],
            clean(finding.row),
            clean(finding.task or "-"),
            finding.layer,
            _line_of(finding),
        ]
        for finding in findings
    ]
    table = (
        tabulate(rows, headers=_HEADERS, tablefmt="plain", disable_numparse=True) if rows else ""
    )
    warnings = [
        clean(f"warning: {finding.name}: {finding.told}") for finding in findings if finding.warning
    ]
    lost_items = [
        f"items lost: {clean(finding.name)}: "
        f"{', '.join(map(str, finding.items[:20]))}{' ...' if len(finding.items) > 20 else ''}"
        for finding in findings
        if finding.verdict is Verdict.regressed and finding.items
    ]
    notes = [clean(f"note: {note}") for note in result.notes]
    parts = (table, *warnings, *lost_items, *notes, f"\n{summary(result)}", result.passed_means)
    return "\n".join(part for part in parts if part)


def markdown(result: CheckResult) -> str:
    """Return the findings as Markdown, for a job's summary."""
    from tabulate import tabulate

    rows = []
    for finding in _gravest_first(result):
        word = _VERDICT_WORDS[finding.verdict]
        rows.append(
            [
                word if finding.verdict is Verdict.passed else f"**{word}**",
                markdown_cell(finding.row),
                markdown_cell(finding.task or "-"),
                markdown_cell(finding.layer),
                markdown_cell(_line_of(finding)),
            ]
        )
    table = tabulate(rows, headers=_HEADERS, tablefmt="pipe", disable_numparse=True)
    notes = "".join(f"- {markdown_text(note)}\n" for note in result.notes)
    meaning = f"{markdown_cell(result.passed_means)}\n\n" if result.passed_means else ""
    title = f"### compression-harness: {summary(result)}"
    return f"{title}\n\n{meaning}{table}\n\n{notes}{_rules_line(result)}\n"


def _rules_line(result: CheckResult) -> str:
    """Return the rules of a check as one item of a Markdown list."""
    rules = result.rules
    claim = (
        f"claim: {rules.claim()} (of choices: above chance), one-sided alpha {rules.alpha:g}; "
        if rules.margin is not None
        else ""
    )
    return (
        f"- Rules: {claim}frozen: exact McNemar, alpha {rules.frozen_alpha:g}, tolerance "
        f"{100 * rules.tolerance:g} points, must be able to show {100 * rules.detect:g} points; "
        "Holm over rows, tasks and pools."
    )


def junit(result: CheckResult) -> str:
    """Return the findings as JUnit XML, one test case each.

    Regressed and missed are failures, not comparable is an error, cannot tell is skipped.
    """
    failed, errors, skipped = (
        sum(finding.verdict in verdicts for finding in result.findings)
        for verdicts in (_FAILED, (Verdict.not_comparable,), (Verdict.cannot_tell,))
    )
    suite = ElementTree.Element(
        "testsuite",
        name="compression-harness",
        tests=str(len(result.findings)),
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
    for finding in _gravest_first(result):
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=clean(f"harness.{finding.row}").replace(" ", "_"),
            name=clean(f"{finding.task or 'row'} [{finding.layer}]"),
        )
        line = _line_of(finding)
        if finding.verdict in tags:
            tag = tags[finding.verdict]
            ElementTree.SubElement(case, tag, message=line, type=finding.verdict.value)
        ElementTree.SubElement(case, "system-out").text = line
    ElementTree.indent(suite)
    xml = ElementTree.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{xml}\n'


def as_json(result: CheckResult) -> str:
    """Return the whole result as JSON."""
    values = clean_all(nonfinite_as_null(result.as_dict()))
    text = json.dumps(values, indent=1, ensure_ascii=False, default=str, allow_nan=False)
    return f"{text}\n"


def annotations(result: CheckResult) -> Sequence[str]:
    """Return workflow commands of GitHub that annotate a CI log.

    Regressed, missed and not comparable are errors; cannot tell is a warning, or a notice if it
    does not count.
    """
    kinds: Mapping[Verdict, str] = {
        **dict.fromkeys(_FAILED, "error"),
        Verdict.not_comparable: "error",
        Verdict.cannot_tell: "warning",
    }

    def escaped(text: str) -> str:
        return clean(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    def annotation(kind: str, finding: Finding, line: str) -> str:
        title = escaped(f"{finding.name}: {finding.verdict.value}")
        title = title.replace(":", "%3A").replace(",", "%2C")
        return f"::{kind} title={title}::{escaped(line)}"

    findings = _gravest_first(result)
    problems = [
        annotation(
            kinds[finding.verdict] if finding.counts else "notice", finding, _line_of(finding)
        )
        for finding in findings
        if finding.verdict in kinds
    ]
    warnings = [
        annotation("warning", finding, finding.told)
        for finding in findings
        if finding.warning and finding.verdict is Verdict.passed
    ]
    return problems + warnings
