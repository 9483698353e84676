"""Symmetric matrices by one of their triangles: half the bytes, for sums that are held, moved and written.

The order of entries is much like LAPACK's rectangular full packed format (Gustavson et al. 2010). Of the lower triangle

    [ A11      ]    A11 and A22 are triangles, A21 is whole; A22ᵀ fills the place beside A11's diagonal, so that
    [ A21  A22 ]    the two make a rectangle, behind which A21 comes.

So they are packed and unpacked by copies of rows, without a list of indices as large as the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raylux.blocks import Blocks, Square, triangle_entries


def pack(matrix: Tensor) -> Tensor:
    """The lower triangle of a matrix [n, n], its diagonal included: [n (n + 1) / 2]. The upper one is not read."""
    half = _half(len(matrix))
    rest = len(matrix) - half
    packed = matrix.new_empty(triangle_entries([len(matrix)]))
    rectangle, square = _parts(packed, half, rest)
    rectangle.zero_()
    rectangle[:, :half] = matrix[:half, :half].tril()
    rectangle[:rest, 1:] += matrix[half:, half:].tril().T
    square.copy_(matrix[half:, :half])
    return packed


def unpack(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrix [size, size] whose triangle it is.

    Args:
        packed: [size (size + 1) / 2], as ``pack`` gives it.
        size: rows.
    """
    half = _half(size)
    rest = size - half
    rectangle, square = _parts(packed, half, rest)
    matrix = packed.new_empty(size, size)
    for place, own in ((slice(0, half), rectangle[:, :half]), (slice(half, size), rectangle[:rest, 1:].T)):
        lower = own.tril()
        matrix[place, place] = lower
        matrix[place, place] += lower.tril(-1).T
    matrix[half:, :half] = square
    matrix[:half, half:] = square.T
    return matrix


def unpack_blocks(packed: Tensor, sizes: Sequence[int]) -> Square:
    """The matrix whose blocks' triangles follow one another: of a single block whole, of several ``Blocks``."""
    parts = packed.split([triangle_entries([size]) for size in sizes])
    blocks = tuple(unpack(part, size) for part, size in zip(parts, sizes, strict=True))
    return blocks[0] if len(blocks) == 1 else Blocks(blocks)


def _half(size: int) -> int:
    """Rows of A11."""
    return (size + 1) // 2


def _parts(packed: Tensor, half: int, rest: int) -> tuple[Tensor, Tensor]:
    """Views of the rectangle [half, rest + 1] and of A21 [rest, half]."""
    rectangle, square = packed.split([half * (rest + 1), rest * half])
    return rectangle.view(half, rest + 1), square.view(rest, half)
