"""The pool of KV blocks: a free list, with reference counts because completions share prompt blocks."""

from __future__ import annotations


class BlockPool:
    """Allocates blocks 1..num_blocks-1. Block 0 is the null block, which pads block tables."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block: int) -> int:
        """Sequences that hold the block; 0: it is free."""
        return self._ref_counts[block]

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks, each with ref_count 1."""
        assert count <= len(self._free), f"{count} blocks requested, {len(self._free)} free: the scheduler must check first"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def fork(self, blocks: list[int]) -> None:
        """Adds one reference to each block: another sequence reads them too."""
        for block in blocks:
            assert self._ref_counts[block] > 0, f"block {block} is free and cannot be forked"
            self._ref_counts[block] += 1

    def free(self, blocks: list[int]) -> None:
        """Drops one reference from each block; a block without references can be allocated again."""
        for block in blocks:
            assert self._ref_counts[block] > 0, f"block {block} is freed more often than it was allocated and forked"
            self._ref_counts[block] -= 1
            if not self._ref_counts[block]:
                self._free.append(block)
