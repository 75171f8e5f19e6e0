"""Which records may stand together, and how two rows of them differ. From records alone. No torch."""
