"""The factor of a wide layer's second moments in one array of float64: elsewhere they are copied four times."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Wide = NDArray[np.float64]

WIDE = 2048
"""Features beyond which a layer's second moments are factored in place; LAPACK takes copies, up to it of 32 MiB."""
LIFTS = (2.0**-23, 2.0**-20, 2.0**-17)
"""Parts of the trace that are added to a diagonal whose matrix, in float32, isn't positive definite."""
_BLOCK = 256


def factor_in_place(gram: NDArray[np.floating], order: NDArray[np.intp]) -> NDArray[np.float32]:
    """R of `rounding_descent.factor` for one matrix: Ĥ[order][:, order] = R Rᵀ, upper.

    Beside its argument it holds one array of float64 of that size, and then the result.

    Args:
        gram: Ĥ, (K, K).
        order: of its features, (K,).

    Raises:
        LinAlgError: the matrix's diagonal isn't finite, or it is far from positive definite.
    """
    features = len(order)
    # The lower factor of the features in reverse order, read backwards, is the upper one.
    work, back = np.empty((features, features)), order[::-1]
    trace = float(np.trace(gram, dtype=np.float64))
    if not np.isfinite(trace):
        raise np.linalg.LinAlgError("the matrix isn't finite")
    for lift in (0.0, *LIFTS):
        for start in range(0, features, _BLOCK):
            rows = slice(start, start + _BLOCK)
            work[rows] = gram[back[rows, None], back]
        np.einsum("kk->k", work)[...] += lift * trace
        try:
            _cholesky(work)
            break
        except np.linalg.LinAlgError:
            if lift == LIFTS[-1]:
                raise
    upper = np.zeros((features, features), np.float32)
    for row in range(features):
        upper[row, row:] = work[features - 1 - row, : features - row][::-1]
    return upper


def _cholesky(matrix: Wide) -> None:
    """Put the lower Cholesky factor in the lower triangle's place, block of columns after block."""
    size = len(matrix)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        diagonal = np.linalg.cholesky(matrix[start:end, start:end])
        matrix[start:end, start:end] = diagonal
        if end == size:
            return
        panel = np.linalg.solve(diagonal, matrix[end:, start:end].T).T
        matrix[end:, start:end] = panel
        for column in range(end, size, _BLOCK):
            stop = min(column + _BLOCK, size)
            matrix[column:, column:stop] -= panel[column - end :] @ panel[column - end : stop - end].T
