"""Times and weighs models, each in its own process, taking turns with its base.

`measure.measure` is the parent, `worker` the process that holds a model (torch inside functions),
`scenario` the grid, `rounds` the rule that ends it. In the process: `runs` are timed, `captured`
ones without launches in between, `launches` tells how long a GPU works, `weighing` counts bytes. In
the parent: `turns` visits the processes, `ratios` makes a ratio of each round.
"""

__all__ = [
    "captured",
    "launches",
    "measure",
    "ratios",
    "rounds",
    "runs",
    "scenario",
    "turns",
    "weighing",
    "worker",
]
