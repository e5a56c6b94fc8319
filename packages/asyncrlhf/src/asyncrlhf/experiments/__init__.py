"""The experiments of the reproduction, at the size of minutes on a CPU.

Each module has the setting of one experiment as data, and the job that runs a part of it. What the
jobs gave becomes evidence in :mod:`~asyncrlhf.experiments.findings`, figures and tables in
:mod:`~asyncrlhf.experiments.exhibits`.
"""
