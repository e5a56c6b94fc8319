"""Training code of other projects, ready to be swept; each module needs its own extra."""
