"""Text -> value -> the same or not. Standard library and mpmath only."""
