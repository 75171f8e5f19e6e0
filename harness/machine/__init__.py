"""The machine at work: processes, processors, memory, energy, load, GPU. torch only inside
functions that ask a device.

`process` watches a process of ours, `monitor` what spoils a timing, `load` and `processor` the
cores, `energy` counts joules, `gpu` finds the card, `memory` reads and gives back bytes.
"""

__all__ = ["energy", "gpu", "load", "memory", "monitor", "process", "processor"]
