"""The mathematical core: pure functions on numpy arrays and torch tensors, without I/O, logging or global state."""
