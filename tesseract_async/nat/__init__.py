"""How a node reaches peers, and is reached, beyond plain TCP."""
