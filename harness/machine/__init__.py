"""The machine at work: processes, processors, memory, energy, load, GPU. torch only inside functions that ask a device."""
