"""One optimizer update, the optimizer, and checkpoints."""
