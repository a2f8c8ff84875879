"""Runs programs that may be hostile."""
