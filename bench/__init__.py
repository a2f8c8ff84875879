"""Benchmarks: `python -m bench.<name>`. Recorded results are in bench/results/; correctness is tested in tests/."""
