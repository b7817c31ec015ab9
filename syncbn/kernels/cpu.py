"""The passes on the CPU, put together from torch's native kernels."""

from syncbn.functional.finish import finish
from syncbn.functional.normalize import backward_sums, grad_input, normalize
from syncbn.functional.stats import group_sums

__all__ = ["backward_sums", "finish", "grad_input", "group_sums", "normalize"]
