"""The command `harness data`: copies what tasks read, and freezes subsets of items. No torch."""

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.options import HELP_FLAGS, Command, CommandGroup, refuse_duplicates
from harness.errors import HarnessError

data_app = typer.Typer(
    name="data",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    cls=CommandGroup,
    context_settings=HELP_FLAGS,
    help="Copy the data of tasks from the Hub, and freeze subsets of their items.",
)


@data_app.command("fetch", cls=Command)
def fetch(
    tasks: Annotated[
        list[str], typer.Argument(help="Tasks or suites: gsm8k, full, lm-eval:arc_easy.")
    ],
    to: Annotated[
        Path, typer.Option("--to", help="The folder, for --data-dir; what it holds stays.")
    ],
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with YAML tasks of your own, for lm-eval:NAME.")
    ] = None,
) -> int:
    """Copy what tasks read from the Hub into a folder; what is there whole is not copied again."""
    from harness import catalog
    from harness.files.places import check_folder
    from harness.planning.spec import joined_lists

    names = joined_lists(tasks) or []
    refuse_duplicates("TASKS", names)
    if to.exists() and not to.is_dir():
        raise HarnessError(f"--to {to} is a file; give a folder")
    check_folder(to, "--to")
    written = 0
    for name in names:
        written += catalog.fetch_data(
            name, to, include_path=include_path, say=lambda line: typer.echo(line)
        )
    typer.echo(f"{written} files written; type: --data-dir {to}")
    return 0


@data_app.command("subset", cls=Command)
def subset(
    spec: Annotated[
        str, typer.Argument(help="NAME:ITEMS or NAME:ITEMS:SEED, such as quick:300; or a FILE.")
    ],
    suite: Annotated[
        list[str], typer.Option(help="Suites or tasks whose items it is of, by commas.")
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Write the items to this file, which --subset takes."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with YAML tasks of your own, for lm-eval:NAME.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with the files of the benchmarks. [default: $HARNESS_DATA_DIR]"),
    ] = None,
) -> int:
    """Show how many items a subset has of each task and which loss they show; write its file."""
    from harness import catalog
    from harness.api import frozen_subset
    from harness.files.places import check_file
    from harness.gate.baseline_tables import power_of_task
    from harness.gate.rules import Rules
    from harness.planning.spec import joined_lists

    names = joined_lists(suite) or []
    refuse_duplicates("--suite", names)
    if to is not None:
        check_file(to, "--to")
    frozen, sizes = frozen_subset(spec, names, include_path=include_path, data_dir=data_dir)
    for name, (count, task_size) in sizes.items():
        task = catalog.load_task(name, include_path=include_path, data_folder=data_dir)
        power = power_of_task(task, count, Rules())
        typer.echo(f"{name}: {count:,} of {task_size:,} items; {power}")
    if to is not None:
        from harness.data.subsets import write_subset

        write_subset(to, frozen)
        typer.echo(f"written: {to}; type: harness run --subset {to}")
    return 0
