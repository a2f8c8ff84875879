"""The algorithm, without I/O: advantages from scored groups, groups packed into microbatches, the loss of one."""
