"""The command `harness data`: copies what tasks read into a folder for `--data-dir`. No torch."""

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
    help="Copy the data of tasks from the Hub, for machines without a network.",
)


@data_app.callback()
def _only_a_group() -> None:
    """Keep `fetch` a command of its own: typer makes the only command of a group the group."""


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
