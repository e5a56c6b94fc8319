"""The experiments of the reproduction, at the size of minutes on a CPU.

Each module has the setting of one experiment as data, and the job that runs a part of it; beside it
stand its figures and tables.
"""
