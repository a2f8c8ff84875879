"""Processes and sharding."""
