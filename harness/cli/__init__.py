"""The command `harness`: options in, exit code out. No torch until a command computes.

`app.main` is the console script. `check` holds the commands that judge, `compare`, `export`,
`recommend` and `show` the commands of these names, `data` the one that copies tasks' data,
`options` what all commands share, `tables` what `harness report` writes, `dry_run` what a plan
looks like. `console` shows progress, `ending` says how a command ended, and `pytest_plugin` turns
rows into tests.
"""

__all__ = [
    "app",
    "check",
    "compare",
    "console",
    "data",
    "dry_run",
    "ending",
    "export",
    "options",
    "pytest_plugin",
    "recommend",
    "run_options",
    "score",
    "show",
    "tables",
]
