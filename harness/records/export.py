"""Records in other projects' forms: lm-eval's results, a `datasets` folder, runs of a tracker.

No torch.
"""

import importlib
import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import HarnessError
from harness.files.writing import write_atomically
from harness.records.record import RunRecord, TaskScore
from harness.records.samples import Evidence
from harness.statistics.figures import standard_error, weighted_mean

_METRICS = {
    "generate": "exact_match",
    "choose": "acc",
    "continue": "acc",
    "perplexity": "word_perplexity",
}


def record_file_name(record: RunRecord) -> str:
    """Return a file name for a record: its row, and its seed where it has one."""
    name = re.sub(r"[^\w.=-]+", "_", record.label).strip("_")
    return f"{name}-seed{record.seed}" if record.seed is not None else name


def lm_eval_results(record: RunRecord) -> dict[str, Any]:
    """Return a record as `lm_eval.simple_evaluate` returns results.

    `lm_eval.utils.make_table` and its other readers take it.
    """
    results: dict[str, dict[str, Any]] = {}
    better: dict[str, dict[str, bool]] = {}
    for score in record.scores:
        results[score.task] = {"alias": score.task, **_metrics(score)}
        better[score.task] = {
            key.partition(",")[0]: not score.lower_is_better
            for key in results[score.task]
            if "," in key
        }
    environment, conditions = record.environment, record.conditions
    return {
        "results": results,
        "group_subtasks": {score.task: [] for score in record.scores},
        "configs": {
            score.task: {"task": score.task, "metadata": {"version": score.version}}
            for score in record.scores
        },
        "versions": {score.task: score.version for score in record.scores},
        "n-shot": {score.task: _shots(score.version) for score in record.scores},
        "higher_is_better": better,
        "n-samples": {
            score.task: {"original": score.n, "effective": score.n} for score in record.scores
        },
        "config": {
            "model": "compression-harness",
            "model_args": f"row={record.label}",
            "batch_size": "auto",
            "device": conditions.device,
            "limit": score_limit(record),
            "bootstrap_iters": 0,
            "gen_kwargs": None,
            "model_dtype": conditions.dtype,
            "model_num_parameters": record.student.parameters if record.student else None,
            "model_sha": record.student.digest if record.student else "",
        },
        "git_hash": environment.commit if environment else None,
        "date": record.created,
        "transformers_version": environment.versions.get("transformers") if environment else None,
        "model_source": "compression-harness",
        "model_name": record.label,
        "system_instruction": conditions.system,
        "chat_template": None,
        "total_evaluation_time_seconds": str(sum(score.seconds for score in record.scores)),
        "harness": {
            "key": record.key,
            "seed": record.seed,
            "teachers": [teacher.name for teacher in conditions.teachers],
            "path": record.path,
        },
    }


def score_limit(record: RunRecord) -> int | None:
    """Return the number of items of a record that was scored on a sample, None of a whole one."""
    counts = {score.n for score in record.scores}
    is_part = not record.conditions.has_all_items
    return counts.pop() if is_part and len(counts) == 1 else None


def _shots(version: str) -> int:
    match = re.search(r"(\d+)shot", version)
    return int(match[1]) if match else 0


def _metrics(score: TaskScore) -> dict[str, float | str]:
    """Return a score's metrics and their errors by lm-eval's keys, `METRIC,FILTER`."""
    name = score.metric or _METRICS[score.kind]
    if score.kind == "perplexity" or score.unpaired or score.form:
        filter_name = score.primary if score.kind == "generate" else "none"
        return _metric(name, filter_name, score.value, score.stderr)
    metrics: dict[str, float | str] = {}
    for extractor, (value, error) in _figures_by_extractor(score).items():
        if score.kind in ("choose", "continue"):  # their extractors are their metrics
            metrics |= _metric(extractor, "none", value, error)
        else:
            metrics |= _metric(name, extractor, value, error)
    return metrics


def _metric(
    name: str, filter_name: str, value: float, error: float | None
) -> dict[str, float | str]:
    return {
        f"{name},{filter_name}": value,
        f"{name}_stderr,{filter_name}": "N/A" if error is None else error,
    }


class _Figure(NamedTuple):
    value: float
    error: float | None  # standard error


def _figures_by_extractor(score: TaskScore) -> dict[str, _Figure]:
    figures: dict[str, _Figure] = {}
    for extractor, values in score.values.items():
        error = standard_error(values, score.parts)
        figures[extractor] = _Figure(weighted_mean(values, score.parts), error)
    for extractor, marks in score.outcomes.items():
        if score.parts:
            hits = [float(mark == "1") for mark in marks]
            error = standard_error(hits, score.parts)
            figures[extractor] = _Figure(weighted_mean(hits, score.parts), error)
            continue
        share = marks.count("1") / score.n
        # of the mean of 0 and 1 with n - 1 in the denominator, as lm-eval's mean_stderr
        error = math.sqrt(share * (1 - share) / (score.n - 1)) if score.n > 1 else None
        figures[extractor] = _Figure(share, error)
    return figures


def to_lm_eval(records: Sequence[RunRecord], out: Path) -> list[Path]:
    """Write one `results_ROW.json` for each record; return the files."""
    written = []
    for record in records:
        written.append(out / f"results_{record_file_name(record)}.json")
        write_atomically(
            written[-1], json.dumps(lm_eval_results(record), indent=2, ensure_ascii=False) + "\n"
        )
    return written


_COLUMNS = (
    "task",
    "item",
    "group",
    "gold",
    "prompt",
    "text",
    "tokens",
    "stop",
    "position",
    "doc_hash",
    "prompt_hash",
    "target_hash",
)


def to_datasets(
    records: Sequence[RunRecord], evidence: Mapping[str, Evidence], out: Path
) -> list[Path]:
    """Write the items of records as a `datasets` folder, a split for each; return it in a list.

    `datasets.load_from_disk(folder)` opens it. Raises `HarnessError` where no answers were kept.
    """
    from datasets import Dataset, DatasetDict

    splits = {}
    for record in records:
        rows = [
            {
                **{name: answer.get(name) for name in _COLUMNS},
                "row": record.label,
                "seed": record.seed,
                "correct": json.dumps(answer.get("correct", {})),
                "extracted": json.dumps(answer.get("extracted", {})),
                "log_probabilities": [
                    float(value) for value in answer.get("log_probabilities", [])
                ],
            }
            for answer in evidence[record.key].answers()
        ]
        if rows:
            splits[re.sub(r"\W+", "_", record_file_name(record))] = Dataset.from_list(rows)
    if not splits:
        raise HarnessError(
            "these records were kept without their answers; name the store of the run "
            "(results/runs) or its run file"
        )
    out.mkdir(parents=True, exist_ok=True)
    DatasetDict(splits).save_to_disk(str(out))
    return [out]


def tracker_metrics(record: RunRecord) -> dict[str, float]:
    """Return the numbers of a record by name, as trackers take them."""
    metrics = {
        f"{score.task}/{score.primary or 'perplexity'}": score.value for score in record.scores
    }
    metrics |= {
        f"{part.name.replace(':', '/')}": part.value
        for part in record.measurements
        if not part.condition or "speedup" in part.name
    }
    metrics |= {f"{part.task}/kl": part.kl for part in record.fidelity}
    cost = record.cost
    metrics |= {
        "cost/seen_tokens": float(cost.seen_tokens),
        "cost/seconds": cost.seconds,
        "cost/flops": cost.flops,
    }
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def tracker_settings(record: RunRecord) -> dict[str, str]:
    """Return how a record was made, as trackers take it."""
    conditions = record.conditions
    return {
        "row": record.label,
        "method": record.method,
        "family": record.family,
        "teacher": ", ".join(teacher.name for teacher in conditions.teachers),
        "student": conditions.student_recipe,
        "seed": str(record.seed),
        "budget": str(conditions.budget_tokens),
        "device": conditions.device,
        "dtype": conditions.dtype,
        "path": record.path,
        "key": record.key,
        **{f"set.{name}": str(value) for name, value in record.settings.items()},
    }


def to_tracker(name: str, records: Sequence[RunRecord], *, project: str) -> list[str]:
    """Write a run of MLflow, W&B or trackio for each record; return a line for each.

    Their own environment variables say where (MLFLOW_TRACKING_URI, WANDB_MODE). Raises
    `HarnessError` where the tracker is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise HarnessError(f"{name} is not installed; type: pip install {name}")
    lines = []
    for record in records:
        title = record_file_name(record)
        if name == "mlflow":
            import mlflow

            mlflow.set_experiment(project)
            with mlflow.start_run(run_name=title):
                mlflow.log_params(tracker_settings(record))
                mlflow.log_metrics(
                    {
                        re.sub(r"[^\w./ -]", "_", key): value
                        for key, value in tracker_metrics(record).items()
                    }
                )
        else:
            tracker = importlib.import_module(name)
            tracker.init(project=project, name=title, config=tracker_settings(record))
            tracker.log(tracker_metrics(record))
            tracker.finish()
        lines.append(f"{name}: {project}/{title}")
    return lines
