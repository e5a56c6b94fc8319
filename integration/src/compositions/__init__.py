"""Decapod's libraries used together, through nothing but their public names.

Each module is one composition: a claim that none of the libraries could test alone, the run that
tests it, and what it found. They are registered as reproductions: ``decapod reproduce NAME``.
"""
