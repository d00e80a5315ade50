"""A whole model as a folder: gates, everything else that is local, and every expert, as they belong together."""
