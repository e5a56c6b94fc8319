"""Timing the operator beside its peers: inputs, arms, measuring, and the record of a run."""
