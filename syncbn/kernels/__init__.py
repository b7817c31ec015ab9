"""The passes over memory, fast: the same signatures as their twins in :mod:`syncbn.functional`, which are the truth.

=================  ====================================================================================================
``group_sums``     count, sum and sum of squares of each channel in each group; reads x once
``finish``         from the reduced sums to mean, invstd, r and d, and the running statistics; small
``normalize``      the elementwise step, with residual and activation; reads x, writes y
``backward_sums``  the two sums that the gradient needs; reads dy and x
``grad_input``     the gradient; reads dy and x, writes dx
=================  ====================================================================================================

:func:`pick` is the one rule that says which implementation runs.
"""

from syncbn.kernels.rule import Kernels, pick

__all__ = ["Kernels", "pick"]
