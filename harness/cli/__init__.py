"""The command `harness`: options in, exit code out. No torch until a command computes."""
