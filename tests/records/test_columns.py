"""The one table of quantities: headers are written once, and tables, page and sorts read them."""

import ast
import copy
import csv
import json
import pickle
import re
from pathlib import Path

import pytest

from harness import api
from harness.estimating import estimate
from harness.gate import baseline_tables, output
from harness.records import columns, model_card
from harness.records.columns import Header, Quantity
from harness.records.store import read_records
from harness.reporting import (
    claims,
    costs,
    formats,
    frame,
    glossary,
    html_page,
    measured,
    notes,
    plots,
    quality,
    report,
    table,
)
from harness.reporting.table import first_number, less_is_better
from harness.statistics.intervals import Interval

ROOT = Path(__file__).parents[2]
HARNESS = ROOT / "harness"
STUDIES = sorted(path.parent for path in (ROOT / "results").glob("*/records"))
HEADERS = {quantity.header for quantity in columns.QUANTITIES}
# a unit, too
DISTINCT = {header for header in HEADERS if not (header.isidentifier() and header.islower())} - {
    "MiB"
}

# Modules whose texts are cells and headers: there a plain word is a header too, but for those that
# are something else.
TABLES = (
    baseline_tables,
    model_card,
    claims,
    costs,
    estimate,
    formats,
    frame,
    glossary,
    measured,
    notes,
    plots,
    quality,
    report,
    table,
    output,
)
ELSEWHERE = {
    baseline_tables: {"items": "in a sentence", "value": "a field of a frozen score"},
    model_card: {"control": "a family", "perplexity": "a kind of task", "teacher": "a start"},
    claims: {
        "family": "a field of the published records",
        "method": "a role of the published records",
        "metric": "a field of them",
        "model": "a field of them",
        "retention": "a name of a claim's range",
        "status": "a field of them",
        "low": "a level of cost",
        "high": "a level of cost",
    },
    estimate: {"teacher": "a part of the memory"},
    formats: {"best": "a field of tables.json"},
    notes: {
        "against": "in a sentence",
        "budget": "a condition",
        "device": "a condition",
        "perplexity": "a kind of task",
        "student": "a condition",
        "teacher": "a condition",
        "tokens": "a field of what a teacher wrote",
    },
    plots: {"control": "a block"},
    quality: {"control": "a block", "perplexity": "a kind of task"},
    table: {"control": "a block", "teacher": "a block"},
    output: {
        "error": "an element of JUnit and a level of annotations",
        "row": "what a test case without a task is called",
    },
}


def texts_of(path):
    """Return every text of a module that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [
        node.body
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    ]
    docstrings = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    texts = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return {node.value.strip() for node in texts if id(node) not in docstrings}


def test_a_header_is_written_once():
    assert len(DISTINCT) > 40
    written = {
        path.name: found
        for path in sorted(HARNESS.rglob("*.py"))
        if path.name != "columns.py"
        and path.parent.name != "renames"
        and (found := texts_of(path) & DISTINCT)
    }
    assert not written, "a header stands in harness/records/columns.py alone; read it from there"


@pytest.mark.parametrize("module", TABLES, ids=lambda module: module.__name__)
def test_modules_that_make_tables_write_no_header(module):
    assert texts_of(Path(module.__file__)) & HEADERS == set(ELSEWHERE.get(module, {}))


def test_the_check_sees_a_header(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text('"""decode x"""\nshown = {"decode x": 1}\nother = f"TTFT ms {shown}"\n')
    assert texts_of(planted) & HEADERS == {"decode x", "TTFT ms"}


def test_the_page_takes_its_headers_from_the_table():
    template = html_page.TEMPLATE.read_text(encoding="utf-8")
    assert not {header for header in DISTINCT if f'"{header}"' in template}
    lists = re.findall(r"(?:columns: |less: |new Set\()(\[[^\]]*\]|\{\{[^}]*\}\})", template)
    assert len(lists) >= 6 and all('"' not in found and "true" not in found for found in lists)
    filled = html_page._with_columns(template)
    assert "{{column" not in filled and "{{less" not in filled and '"changed %"' in filled


@pytest.fixture(scope="module")
def built():
    """What is said of every committed study, with a price and every row against another."""
    studies = {}
    for folder in STUDIES:
        records, problems = read_records(folder / "records")
        assert not problems
        label = next(
            record.label
            for record in records
            if not record.is_control and record.label != "teacher"
        )
        studies[folder.name] = report.build_sections(
            records, report.ReportOptions(price=1.0, references=(label,))
        )
    return studies


def columns_of(sections):
    """Return the columns that tables show, and those of the exact values behind them."""
    tables = [one for section in sections for one in section.tables]
    return {column for one in tables for column in one.columns}, {
        column for one in tables for line in one.exact for column in line
    }


def test_every_column_of_every_committed_table_has_its_quantity(built):
    for sections in built.values():
        shown, exact = columns_of(sections)
        for column in shown | exact:
            assert (
                isinstance(column, Header)
                and column.quantity in columns.QUANTITIES
                and column.quantity.help
            ), column


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_what_is_committed_has_no_other_columns(built, folder):
    shown, exact = columns_of(built[folder.name])
    groups = json.loads((folder / "tables" / "tables.json").read_text(encoding="utf-8"))["groups"]
    assert {
        column for group in groups for one in group["tables"] for column in one["columns"]
    } <= shown
    for path in (folder / "tables").glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as lines:
            assert set(next(csv.reader(lines))) <= exact, path


def numbers_of_blocks(one, column):
    """Return a column's numbers, block by block, in the order of the rows."""
    at, blocks = one.columns.index(column), {}
    for row, block in zip(one.rows, one.blocks, strict=True):
        if (number := first_number(row[at])) is not None:
            blocks.setdefault(block, []).append(number)
    return blocks.values()


def test_numbers_are_sorted_the_better_way(built):
    tables = [
        one
        for sections in built.values()
        for section in sections
        for one in section.tables
        if any(one.blocks)
    ]
    pairs = [(one, column) for one in tables for column in one.columns if not column.quantity.words]
    ordered = [
        (made, column) for one, column in pairs if (made := one.ordered_by(column)) is not one
    ]
    assert len(ordered) > 50
    for one, column in ordered:
        for numbers in numbers_of_blocks(one, column):
            assert numbers == sorted(numbers, reverse=column.quantity.better != "lower"), (
                one.name,
                column,
            )


def test_the_page_sorts_by_the_same_direction(built):
    sections = [section for each in built.values() for section in each]
    for section in sections:
        for drawn, one in zip(
            html_page._group_data(section, "x", {})["tables"], section.tables, strict=True
        ):
            assert drawn["less"] == [column.quantity.better == "lower" for column in one.columns]
    words = {column.quantity.header for column in columns_of(sections)[0] if column.quantity.words}
    assert words <= {one.header for one in html_page._WORDS} and all(
        one.words for one in html_page._WORDS
    )


def test_measurements_have_the_units_and_directions_of_the_table():
    known = {one.key: one for one in columns.QUANTITIES}
    seen = set()
    for folder in STUDIES:
        for record in read_records(folder / "records")[0]:
            for one in record.measurements:
                name = one.name.partition(":")[0]
                if name.startswith("skipped_"):
                    continue
                assert (one.unit, one.higher_is_better) == (
                    known[name].stored,
                    known[name].better == "higher",
                ), name
                seen.add(name)
    assert len(seen) > 15


UNITS = {
    " ms": "ms",
    " s": "s",
    " MiB": "MiB",
    " x": "x",
    " tok/s": "tok/s",
    " J": "J",
    "FLOPs": "FLOP",
    " (points)": "points",
}
SCALES = {("s", "ms"): 1000, ("bytes", "MiB"): 1 / 2**20, ("bytes", "GiB"): 1 / 2**30}


@pytest.mark.parametrize("quantity", columns.QUANTITIES, ids=lambda quantity: quantity.key)
def test_unit_scale_and_format_agree(quantity):
    ending = next((unit for end, unit in UNITS.items() if quantity.header.endswith(end)), None)
    assert ending is None or quantity.unit == ending or quantity.header == columns.GAP.header
    assert quantity.scale == SCALES.get((quantity.stored, quantity.unit), 1)
    assert not quantity.share or quantity.unit in ("%", "points")
    assert not (quantity.leads and quantity.better == "none")
    if quantity.format:
        assert first_number(quantity.text(quantity.scaled(0.5))) is not None
    assert quantity.text(None) == "-" and len(quantity.help) > 5


def test_keys_are_unique_and_one_header_means_one_thing():
    keys = [quantity.key for quantity in columns.QUANTITIES]
    assert len(keys) == len(set(keys))
    for quantity in columns.QUANTITIES:
        alike = [
            other
            for other in columns.QUANTITIES
            if other.header == quantity.header and other.term == quantity.term
        ]
        assert len({(other.help, other.better, other.words) for other in alike}) == 1, (
            quantity.header
        )


def test_the_glossary_is_the_tables_help():
    assert (
        glossary.GLOSSARY["retention"] == columns.RETENTION.help
        and glossary.GLOSSARY["disk"] == columns.DISK_X.help == columns.DISK.help
    )
    listed = [quantity for quantity in columns.QUANTITIES if quantity.term != ""]
    assert {quantity.help for quantity in listed} == set(glossary.GLOSSARY.values())


@pytest.mark.parametrize(
    ("quantity", "stored", "column", "cell"),
    [
        (columns.TTFT, 0.01234, 12.34, "12.3"),
        (columns.DISK, 5 * 2**20, 5.0, "5.00"),
        (columns.DISK, 0.004 * 2**20, 0.004, "0.004"),
        (columns.TOP1_AGREEMENT, 0.9714, 0.9714, "97.1 %"),
        (columns.DROP_SHOWN, 0.051, 0.051, "5.1"),
        (columns.FLOPS, 1.5e9, 1.5e9, "1.50e+09"),
        (columns.TOKENS_SEEN, 12345.0, 12345.0, "12,345"),
        (columns.AGAINST_TEACHER, 1234.5, 1234.5, "x1.2e+03"),
    ],
)
def test_a_number_is_scaled_and_written(quantity, stored, column, cell):
    assert (
        quantity.scaled(stored) == pytest.approx(column)
        and quantity.text(quantity.scaled(stored)) == cell
    )


def test_an_interval_is_written_in_the_form_of_its_value():
    assert columns.RETENTION.with_interval(Interval(0.971, 0.95, 0.992)) == "97.1 % [95.0, 99.2]"
    assert columns.GAP.with_interval(Interval(-0.012, -0.03, 0.006)) == "-1.2 [-3.0, +0.6]"
    assert columns.GAP_OF_NUMBERS.with_interval(Interval(0.5, None, None)) == "+0.500"
    assert (
        columns.GAP_AS_RATIO.with_interval(Interval(0.898, 0.880, 0.917)) == "x0.898 [0.880, 0.917]"
    )
    assert columns.RATIO.with_interval(Interval(0.001, 0.0005, 1.5)) == "x0.001 [0.0005, 1.5]"
    assert columns.DECODE_X.with_interval(Interval(None)) == "-"


@pytest.mark.parametrize("task", ["money", "trained-qa", "seen", "perplexity-quiz", "energy x"])
def test_a_tasks_name_does_not_turn_a_columns_direction(task):
    for quantity in (
        columns.SCORE,
        columns.RETENTION,
        columns.KL,
        columns.PER_PROBLEM,
        columns.LENGTH_X,
    ):
        column = quantity.name.of(task)
        assert task in column and quantity.header in column
        assert less_is_better(column) == (quantity.better == "lower")
        assert columns.quantity_of(str(quantity.name)) is quantity
    assert not less_is_better(f"{task} score") and less_is_better(f"{task} KL")


def test_a_table_orders_a_column_by_its_quantity():
    cells = [
        table.RowCells(
            {
                columns.ROW.name: label,
                columns.RETENTION.name.of("trained-qa"): columns.RETENTION.text(value),
            },
            {columns.FAMILY.name: "x"},
        )
        for label, value in (("a", 0.2), ("b", 0.9))
    ]
    made = table.build_table("quality", "x", cells)
    assert [row[0] for row in made.ordered_by("trained-qa retention").rows] == ["b", "a"]


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda header: pickle.loads(pickle.dumps(header))]
)
def test_a_copy_of_a_header_knows_its_quantity(copied):
    header = columns.DISK.low
    assert copied(header) == "disk MiB low" and copied(header).quantity.key == columns.DISK.key


def test_a_quantity_cannot_be_changed():
    with pytest.raises(AttributeError):
        columns.ROW.header = "line"
    assert isinstance(columns.ROW, Quantity)


def test_doors_read_the_table():
    assert (
        [one.header for one in columns.FRAME]
        == list(frame.frame_of(()).columns)
        == list(api.load_records(STUDIES[0] / "records").columns)
    )
    assert output._HEADERS == ["verdict", "row", "task", "layer", "why"]
