"""The ops of reason_rl. Each has a folder with its reference, its kernels and its contract checks.

This package imports torch and, at the first call of a Triton kernel, triton. It imports nothing of the
trainer, so it can be copied out whole. `python -m kernels` prints which implementation of each op runs on
this machine and why.
"""

__version__ = "0.1.0"
