"""Times and weighs models, each in a process of its own, by turns with the one that it is compared with."""
