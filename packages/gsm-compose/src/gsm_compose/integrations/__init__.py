"""One module per foreign tool; each works with the tool itself."""
