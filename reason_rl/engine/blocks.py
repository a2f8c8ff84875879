"""The pool of KV blocks: a free list and a count of holders per block, so that a group's completions share its prompt."""

from __future__ import annotations


class BlockPool:
    """Blocks 1..num_blocks-1 are lent out; block 0 is nobody's and pads block tables."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free blocks, each with one holder."""
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free: the scheduler must check first"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: list[int]) -> None:
        """One more holder for each."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is free and cannot be shared"
            self._holders[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One holder less for each; a block without holders is free."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is released more often than held"
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)
