"""Benchmarks: `python -m bench.<name>`. bench/results/ has recorded results, tests/ the correctness tests."""
