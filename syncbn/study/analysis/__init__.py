"""From results to numbers: summaries, comparisons, intervals."""
