"""Verifiers in worker processes, so that a hang or a crash cannot stop training."""
