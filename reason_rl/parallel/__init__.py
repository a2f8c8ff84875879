"""Processes of a run, and sharding of its model."""
