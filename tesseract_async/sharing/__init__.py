"""Parameters that all trainers of a run share: how they are cut, hosted, pushed and merged. Pure."""
