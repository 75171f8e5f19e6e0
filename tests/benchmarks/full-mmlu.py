"""Full MMLU offline: a small random teacher and two students on all items of `--data-dir`.

python tests/benchmarks/full-mmlu.py --data-dir DATA [--subjects anatomy,marketing] [--limit N]
[--keep FOLDER]
"""

import argparse
import gzip
import json
import shutil
import tempfile
import time
from pathlib import Path

from _form import figure, write_figures

import harness
from harness.files.lines import read_json_lines


def random_teacher(folder: Path) -> Path:
    """Save a random model of one block with the embedded tokenizer, unless it is saved already."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from harness.models.resolve import EMBEDDED

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            **shape,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def copy_subjects(data: Path, folder: Path, subjects: list[str]) -> Path:
    """Copy the rows of some subjects into a data folder of their own."""
    (folder / "mmlu").mkdir(parents=True, exist_ok=True)
    for stem in ("dev", "val", "test"):
        packed = data / "mmlu" / f"{stem}.jsonl.gz"
        rows = [
            row
            for row in read_json_lines(packed if packed.exists() else packed.with_suffix(""))
            if row["subject"] in subjects
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "mmlu" / f"{stem}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    return folder


def _figure(done: harness.Run) -> dict[str, object]:
    """Return the share of rows that were scored to their end, with what each took."""
    scores = {record.label: record.score("mmlu") for record in done.records}
    rows = {
        label: {
            "items": score.n,
            "subjects": len(score.groups),
            "accuracy": score.value,
            "seconds": round(score.seconds),
        }
        for label, score in scores.items()
        if score
    }
    scored = sum(row["items"] == 14_042 for row in rows.values()) / len(scores)
    return figure(
        "full-mmlu",
        [scored],
        unit="of three rows scored on all 14,042 items",
        better="higher",
        target=1.0,
        details=rows,
    )


def main() -> None:
    """Run the teacher and two students, and print a line for each row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--subjects", default="")
    parser.add_argument("--limit", type=int)
    parser.add_argument(
        "--keep", type=Path, help="a folder that stays: a run that was stopped goes on there"
    )
    options = parser.parse_args()
    place = options.keep or Path(tempfile.mkdtemp())
    try:
        data = (
            copy_subjects(options.data_dir, place / "data", options.subjects.split(","))
            if options.subjects
            else options.data_dir
        )
        began = time.monotonic()
        done = harness.run(
            "int8,prune-magnitude",
            "mmlu",
            teacher=str(random_teacher(place / "teacher")),
            controls=False,
            grid="none",
            limit=options.limit,
            noise=0,
            data_dir=data,
            out=place / "runs",
            cache=place / "cache",
        )
        for record in done.records:
            score = record.score("mmlu")
            text = (
                f"{100 * score.value:.1f} % of {score.n:,}, {len(score.groups)} subjects, "
                f"{score.seconds:.0f} s"
                if score
                else record.reason
            )
            print(f"{record.label}: {record.status}: {text}", flush=True)
        print(
            f"{time.monotonic() - began:.0f} s; "
            f"{'every row scored' if done.succeeded else 'A ROW FAILED'}"
        )
        assert done.succeeded, [record.reason for record in done.records]
        assert "retention" in done.markdown()
        if not options.subjects and not options.limit:
            write_figures("full-mmlu", [_figure(done)])
    finally:
        if options.keep is None:
            shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
