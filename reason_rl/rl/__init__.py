"""The algorithm, without I/O: advantages of graded groups, and their microbatches for the update."""
