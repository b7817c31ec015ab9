"""The passes over memory, fast: the same signatures as their twins in :mod:`syncbn.functional`, which define them.

:mod:`syncbn.kernels.dispatch` has the list of functions and the one rule that says which implementation runs.
"""
