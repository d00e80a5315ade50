"""The ways by which a node reaches its peers and is reached, beyond plain TCP."""
