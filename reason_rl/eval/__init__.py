"""Measure a checkpoint: `python -m reason_rl.eval`."""
