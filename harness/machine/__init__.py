"""The machine: processes, processors, memory, energy, load, GPU.

`process` watches our processes, `monitor` what disturbs a timing, `load` and `processor` the cores,
`energy` counts joules, `gpu` finds the card, `memory` counts and frees bytes. torch is imported
only inside functions that need a device.
"""

__all__ = ["energy", "gpu", "load", "memory", "monitor", "process", "processor"]
