"""Some cells of the parity design (tests/benchmarks/parity.py): our scorer beside lm-eval's own."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _forms
import _parity
from _parity import Cell

CELLS = (
    Cell("llama", "prepend", "letters", 3),
    Cell("gemma2", "byte-fallback", "stops", 16),
    Cell("lfm2", "metaspace-first", "max-new-tokens", 3),
    Cell("mamba", "wordpiece", "cloze", 16),
    Cell("mixtral", "metaspace-always", "rolling", 1),
    Cell("qwen3_next", "appends-eos", "unspaced", 3),
    Cell("rwkv", "byte-bpe-bos", "one-continuation", 16),
    Cell("qwen2", "prepend", "fractional", 3),
    Cell("llama", "byte-fallback", "lower-is-better", 1),
    Cell("llama", "metaspace-never", "corpus", 16),
    Cell("llama", "prepend", "group-of-equals", 3),
    Cell("qwen2", "byte-bpe-bos", "ends", 3),
    Cell("mamba", "metaspace-first", "ends", 16),
    Cell("gemma2", "prepend", "ends-of-nothing", 3),
    Cell("llama", "appends-eos", "ends-shots", 16),
    Cell("xlstm", "prepend", "stops", 16),
    Cell("kimi_linear", "metaspace-always", "letters", 3),
    Cell("zamba", "byte-bpe-bos", "stops", 3),
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    _forms.write_tasks(folder)
    return folder


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_every_item_is_answered_as_lm_eval_answers_it(cell, tasks):
    outcome = _parity.compare_cell(cell, tasks)
    assert not outcome.refused and outcome.alike == outcome.items >= 7, outcome.differs


def test_the_design_meets_every_pair_of_values_and_is_wide():
    from itertools import combinations

    cells = _parity.design()
    values = [(cell.architecture, cell.tokenizer, cell.form, cell.batch) for cell in cells]
    for first_factor, second_factor in combinations(range(4), 2):
        assert len(
            {(cell_values[first_factor], cell_values[second_factor]) for cell_values in values}
        ) == len(_parity.FACTORS[first_factor]) * len(_parity.FACTORS[second_factor])
    assert (
        len(_parity.FACTORS[0]) >= 24
        and len(cells) * _forms.ITEMS >= 3_000
        and cells == _parity.design()
    )
