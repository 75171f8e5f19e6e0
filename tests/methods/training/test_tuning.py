"""The learning rate is searched on held-out training rows, once for all seeds."""

import json
from dataclasses import replace

import pytest
from distilling import REGISTRY, SETTINGS, job, rows_of

from harness.errors import OldName
from methods.training.settings import Training


@pytest.mark.slow
def test_the_rate_is_chosen_on_held_out_training_rows_once_for_all_seeds(
    tiny, tmp_path, monkeypatch
):
    from methods.training import tuning

    tuned_job = job([tiny], tmp_path / "one", tune=True, rows=60)
    REGISTRY.build("sft", {"batch_size": 4}).compress(tuned_job)
    notes = json.loads((tmp_path / "one" / "cost.json").read_text())["notes"]
    tried = {float(rate): loss for rate, loss in notes["rates_tried"].items()}
    assert {1e-3, 5e-4, 2e-3} <= tried.keys() and notes["learning_rate"] == min(
        tried, key=tried.get
    )
    steps = [
        json.loads(line) for line in (tmp_path / "one" / "training.jsonl").read_text().splitlines()
    ]
    assert max(line.get("rate", 0) for line in steps) <= notes["learning_rate"]
    monkeypatch.setattr(tuning, "_search", lambda *a, **k: pytest.fail("searched again"))
    REGISTRY.build("sft", {"batch_size": 4}).compress(
        replace(tuned_job, seed=2, workdir=_made(tmp_path / "two"))
    )
    cost = json.loads((tmp_path / "two" / "cost.json").read_text())
    assert cost["notes"]["rates_tried"] == notes["rates_tried"] and cost["shared"][0]["tokens"] > 0
    with pytest.raises(pytest.fail.Exception, match="searched again"):
        REGISTRY.build("sft", {"batch_size": 8}).compress(
            replace(tuned_job, workdir=_made(tmp_path / "three"))
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("better", "farthest"),
    [(lambda rate: 1 / rate, 64), (lambda rate: rate, 1 / 64), (lambda rate: abs(rate - 0.02), 4)],
)
def test_the_search_walks_on_while_the_best_stands_at_an_edge(
    better, farthest, tmp_path, monkeypatch
):
    from types import SimpleNamespace

    from methods.training import tuning

    def spent(*_, settings, **__):
        return SimpleNamespace(best=better(settings.learning_rate), seen=0, written=0)

    monkeypatch.setattr(tuning, "fit", spent)
    monkeypatch.setattr(tuning, "forward_flops_per_token", lambda *_: 0.0)
    monkeypatch.setattr(tuning, "step_flops", lambda *_: 0.0)
    result = tuning._search(
        SimpleNamespace(workdir=tmp_path, device="cpu"),
        rows_of(8),
        SETTINGS,
        key="",
        training=Training(seen_tokens=900, seed=4, workdir=tmp_path),
        student=lambda _: SimpleNamespace(model=None),
        objective=lambda: SimpleNamespace(live_teachers=()),
    )
    tried = [float(rate) for rate in result["losses"]]
    assert (max(tried) if farthest > 1 else min(tried)) == pytest.approx(
        farthest * SETTINGS.learning_rate
    )


def _made(folder):
    folder.mkdir()
    return folder


def test_options_given_one_by_one_as_before_are_taken(monkeypatch):
    """Methods of other packages gave `train` what stands in `TrainOptions` now, by the same
    names.
    """
    from methods.sft import SupervisedFineTuning
    from methods.training import trainer
    from methods.training.base import TrainOptions

    received = []

    class Heard:
        def __init__(self, method, job, inputs):
            received.append(inputs)

        def train(self, pairs):
            return None

    monkeypatch.setattr(trainer, "Trainer", Heard)
    method = SupervisedFineTuning()
    method.train(None, [], terms=(), seen_tokens=5, encoder=len)
    method.train(None, [], terms=(), options=TrainOptions(seen_tokens=5), encoder=len)
    assert [inputs.options for inputs in received] == [TrainOptions(seen_tokens=5, encoder=len)] * 2
    with pytest.warns(OldName, match="inwards is taps now"):
        method.train(None, [], terms=(), inwards="config")
    assert received[-1].options == TrainOptions(taps="config")
    with pytest.raises(TypeError, match="rolout"):
        method.train(None, [], terms=(), rolout=None)
