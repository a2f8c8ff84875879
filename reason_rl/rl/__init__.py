"""The algorithm, without I/O: advantages of graded groups (advantages.py), and microbatches for the update (packing.py)."""
