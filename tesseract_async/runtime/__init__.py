"""The one busy thread of a device: batcher (no I/O), backend (what an expert computes), runtime (the thread)."""
