"""Saves a whole model as a folder: gates, everything else that is local, and every expert, all as of one moment."""
