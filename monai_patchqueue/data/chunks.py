# SPDX-License-Identifier: Apache-2.0
"""Batches that are loaded in chunks, for gradient accumulation."""

from __future__ import annotations

from dataclasses import dataclass

from .arguments import positive

__all__ = ["Chunks"]


@dataclass(frozen=True)
class Chunks:
    """A size of batches, and the number of equal chunks that each comes in.

    Args:
        batch_size: as asked for.
        count: chunks of a batch.

    Raises:
        TypeError, ValueError: numbers that make no sense, or a batch that cannot be divided equally.

    Example:
        >>> Chunks(batch_size=12, count=3).size(available=100), Chunks(batch_size=12, count=3).size(available=10)
        (4, 3)
    """

    batch_size: int
    count: int

    def __post_init__(self) -> None:
        positive("batch_size", self.batch_size)
        positive("batch_chunk_count", self.count)
        if self.batch_size % self.count:
            near = max(self.batch_size // self.count, 1) * self.count
            raise ValueError(
                f"batch_size={self.batch_size} cannot be divided by batch_chunk_count={self.count}: chunks must be "
                f"equal. Take batch_size={near}, for instance."
            )

    def size(self, available: int, unit: str = "patches") -> int:
        """The size of a chunk, where batches are cut to what there is.

        Args:
            available: what an epoch of a rank has.
            unit: of what.

        Raises:
            ValueError: less than one for each chunk.
        """
        if available < self.count:
            raise ValueError(
                f"the training split gives {available} {unit} in an epoch on each rank, too few for "
                f"batch_chunk_count={self.count} chunks. Lower batch_chunk_count, or add samples."
            )
        return min(self.batch_size, available) // self.count
