"""Times and weighs models, each in its own process, taking turns with its base.

`measure.measure` is the parent, `worker` the process that holds a model (torch inside functions),
`scenario` the grid.
"""

__all__ = ["measure", "scenario", "worker"]
