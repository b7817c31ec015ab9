"""The passes over memory, fast. A function's twin is the function of :mod:`syncbn.functional` with the same name and
signature, which defines its result.

:func:`syncbn.kernels.dispatch.pick` says which implementation runs for a tensor, and :func:`syncbn.autograd.batch_norm`
which function is called.
"""
