"""The CPU's kernels in C++, and their build. Nothing here imports torch: the package's own build runs it too."""
