"""The passes over memory, fast. The *twin* of a function here is the :mod:`syncbn.functional` function of the same name
and signature, which defines its result.

:func:`syncbn.kernels.dispatch.pick` says which implementation runs for a tensor; :func:`syncbn.autograd.batch_norm`
says which function.
"""
