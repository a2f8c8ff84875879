"""The ops of reason_rl, each in its own folder with its reference, its kernels and its contract checks.

This package imports torch (and triton where it has kernels) and nothing of the trainer, so it can be lifted
out whole. `python -m kernels` prints which implementation of each op runs on this machine and why.
"""

__version__ = "0.1.0"
