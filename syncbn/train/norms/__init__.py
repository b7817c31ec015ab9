"""The normalizations that a run can name."""
