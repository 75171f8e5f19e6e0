"""Records in other projects' forms: lm-eval's result files, a `datasets` folder of items, runs of a
tracker. No torch.
"""

import importlib
import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.files.writing import write_atomically
from harness.records.record import RunRecord, TaskScore
from harness.records.samples import Evidence
from harness.statistics.figures import standard_error, weighted_mean

_METRICS = {"generate": "exact_match", "choose": "acc", "perplexity": "word_perplexity"}


def record_file_name(record: RunRecord) -> str:
    """Return a file name for a record: its row, and its seed where it has one."""
    name = re.sub(r"[^\w.=-]+", "_", record.label).strip("_")
    return f"{name}-seed{record.seed}" if record.seed is not None else name


def lm_eval_results(record: RunRecord) -> dict[str, Any]:
    """Return a record as `lm_eval.simple_evaluate` would have: what `lm_eval.utils.make_table` and
    its readers take.
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
    environment, under = record.environment, record.conditions
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
            "device": under.device,
            "limit": score_limit(record),
            "bootstrap_iters": 0,
            "gen_kwargs": None,
            "model_dtype": under.dtype,
            "model_num_parameters": record.student.parameters if record.student else None,
            "model_sha": record.student.digest if record.student else "",
        },
        "git_hash": environment.commit if environment else None,
        "date": record.created,
        "transformers_version": environment.versions.get("transformers") if environment else None,
        "model_source": "compression-harness",
        "model_name": record.label,
        "system_instruction": under.system,
        "chat_template": None,
        "total_evaluation_time_seconds": str(sum(score.seconds for score in record.scores)),
        "harness": {
            "key": record.key,
            "seed": record.seed,
            "teachers": [one.name for one in under.teachers],
            "path": record.path,
        },
    }


def score_limit(record: RunRecord) -> int | None:
    """Return the number of items of a record that was scored on a sample, None of a whole one."""
    counts = {score.n for score in record.scores}
    return counts.pop() if record.conditions.limited and len(counts) == 1 else None


def _shots(version: str) -> int:
    found = re.search(r"(\d+)shot", version)
    return int(found[1]) if found else 0


def _metrics(score: TaskScore) -> dict[str, float | str]:
    name = score.metric or _METRICS[score.kind]
    if score.kind == "perplexity" or score.unpaired or score.form:
        filtered = score.primary if score.kind == "generate" else "none"
        return {
            f"{name},{filtered}": score.value,
            f"{name}_stderr,{filtered}": "N/A" if score.stderr is None else score.stderr,
        }
    found: dict[str, float | str] = {}
    for extractor, values in score.values.items():
        metric, filtered = (extractor, "none") if score.kind == "choose" else (name, extractor)
        found[f"{metric},{filtered}"] = weighted_mean(values, score.parts)
        error = standard_error(values, score.parts)
        found[f"{metric}_stderr,{filtered}"] = "N/A" if error is None else error
    for extractor, marks in score.outcomes.items():
        share = marks.count("1") / score.n
        metric, filtered = (extractor, "none") if score.kind == "choose" else (name, extractor)
        if score.parts:
            hits = [float(mark == "1") for mark in marks]
            error = standard_error(hits, score.parts)
            found[f"{metric},{filtered}"] = weighted_mean(hits, score.parts)
            found[f"{metric}_stderr,{filtered}"] = "N/A" if error is None else error
            continue
        found[f"{metric},{filtered}"] = share
        # of the mean of 0 and 1 with n - 1 in the denominator, as lm-eval's mean_stderr
        found[f"{metric}_stderr,{filtered}"] = (
            math.sqrt(share * (1 - share) / (score.n - 1)) if score.n > 1 else "N/A"
        )
    return found


def to_lm_eval(records: Sequence[RunRecord], out: Path) -> list[Path]:
    """Write one `results_ROW.json` a record; return the files."""
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
    """Write the items of every record as a `datasets` folder, a split a row:
    `datasets.load_from_disk(folder)` opens it.
    """
    from datasets import Dataset, DatasetDict

    splits = {}
    for record in records:
        rows = [
            {
                **{name: one.get(name) for name in _COLUMNS},
                "row": record.label,
                "seed": record.seed,
                "correct": json.dumps(one.get("correct", {})),
                "extracted": json.dumps(one.get("extracted", {})),
                "log_probabilities": [float(value) for value in one.get("log_probabilities", [])],
            }
            for one in evidence[record.key].answers()
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
    found = {
        f"{score.task}/{score.primary or 'perplexity'}": score.value for score in record.scores
    }
    found |= {
        f"{one.name.replace(':', '/')}": one.value
        for one in record.measurements
        if not one.condition or "speedup" in one.name
    }
    found |= {f"{one.task}/kl": one.kl for one in record.fidelity}
    cost = record.cost
    found |= {
        "cost/seen_tokens": float(cost.seen_tokens),
        "cost/seconds": cost.seconds,
        "cost/flops": cost.flops,
    }
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def tracker_settings(record: RunRecord) -> dict[str, str]:
    """Return what a record was made by, as trackers take it."""
    under = record.conditions
    return {
        "row": record.label,
        "method": record.method,
        "family": record.family,
        "teacher": ", ".join(one.name for one in under.teachers),
        "student": under.student_recipe,
        "seed": str(record.seed),
        "budget": str(under.budget_tokens),
        "device": under.device,
        "dtype": under.dtype,
        "path": record.path,
        "key": record.key,
        **{f"set.{name}": str(value) for name, value in record.settings.items()},
    }


def to_tracker(name: str, records: Sequence[RunRecord], *, project: str) -> list[str]:
    """Write a run of MLflow, W&B or trackio for each record; their own variables say where
    (MLFLOW_TRACKING_URI, WANDB_MODE).
    """
    if importlib.util.find_spec(name) is None:
        raise HarnessError(f"{name} is not installed; type: pip install {name}")
    done = []
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
        done.append(f"{name}: {project}/{title}")
    return done
