"""Times and weighs models, each in a process of its own, by turns with the one that it is compared
with.

`measure.measure` is the parent, `worker` the process that holds a model (torch inside functions),
`scenario` the grid.
"""

__all__ = ["measure", "scenario", "worker"]
