"""A device's busy thread: batcher (no I/O), backend (what an expert computes), runtime (the thread)."""
