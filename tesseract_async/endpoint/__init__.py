"""Many calls at once to one peer: protocol (no I/O), connection, pool, endpoint."""
