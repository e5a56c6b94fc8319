"""Timing the operator beside its peers: inputs, arms, timing, and the record of a run."""
