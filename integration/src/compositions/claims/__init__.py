"""Claims of the compositions, each beside the composition of its name."""
