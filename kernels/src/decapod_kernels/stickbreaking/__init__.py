"""Stick-breaking attention in Triton: forward, backward, decoding.

The functions load Triton when they are first called: importing this package does not.
"""
