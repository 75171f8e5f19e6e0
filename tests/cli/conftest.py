"""A folder of two records for the commands."""

import pytest
from gate_rows import SAME, TEACHES

from harness.records.record import write_record


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "records"
    for record in (TEACHES, SAME):
        write_record(folder / f"{record.label}.json", record)
    return folder
