"""The command `harness`: options in, exit code out. No torch until a command computes.

`app.main` is the console script, `check` the commands that judge and hand on, `options` what all
commands share, `tables` what `harness report` writes, `console` shows progress, `ending` says how a
command ends, `pytest_plugin` makes rows into tests.
"""

__all__ = ["app", "check", "console", "ending", "options", "pytest_plugin", "run_options", "tables"]
