"""Answers calls to experts, declares them in the network, keeps their checkpoints."""
