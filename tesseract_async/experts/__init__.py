"""Experts in the network: uids, the grid, the manifests by which servers say what they host, and runs."""
