"""`python -m harness.cli`: the command `harness` where no console script is installed."""

from harness.cli.app import main

if __name__ == "__main__":
    main()
