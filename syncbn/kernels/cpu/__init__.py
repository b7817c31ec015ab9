"""The CPU kernels, in C++, and their calls by ctypes."""
