"""From numbers to a page and a table."""
