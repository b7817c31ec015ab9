"""Side-by-side measurements: the layers against their peers and against the machine's limits."""
