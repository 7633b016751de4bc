"""The two norms that distances are measured in, of a matrix given as (rows, columns).

Both are computed in float64 whatever the dtype of the matrix: a float32 ``torch.linalg.vector_norm`` of a large layer
is wrong in the fourth digit, which no guarantee can stand on.
"""

import torch
from torch import Tensor

__all__ = ["add_up_rows", "frobenius", "mars", "row_sums"]

_MOST_IN_ONE_THREAD = 1 << 15  # PyTorch splits the sum of a longer tensor to one number among its threads


def add_up_rows(X: Tensor) -> Tensor:
    """The sum of each row, in an order that does not depend on the number of threads.

    Args:
        X: A matrix (rows, columns) of any floating dtype.

    Returns:
        float64, shape (rows,).
    """
    if len(X) != 1 or X.shape[1] < _MOST_IN_ONE_THREAD:
        return X.sum(dim=1, dtype=torch.float64)
    whole = X.shape[1] // 128 * 128
    parts = X[:, :whole].reshape(-1, 128).sum(dim=1, dtype=torch.float64)
    return add_up_rows(parts.unsqueeze(0)) + X[:, whole:].sum(dim=1, dtype=torch.float64)


def row_sums(T: Tensor) -> Tensor:
    r"""The l1 norm of each row, :math:`\sum_i |T_{ri}|`.

    Args:
        T: A matrix (rows, columns) of any floating dtype.

    Returns:
        float64, shape (rows,).
    """
    return add_up_rows(T.abs())


def mars(T: Tensor) -> Tensor:
    r"""The maximum absolute row sum, :math:`\max_r \sum_i |T_{ri}|`: the operator norm induced by l-infinity.

    Args:
        T: A matrix (rows, columns) of any floating dtype.

    Returns:
        float64, 0-d; 0 for an empty matrix.

    Example:
        >>> mars(torch.tensor([[1.0, -2.0], [0.5, 0.5]])).item()
        3.0
    """
    return row_sums(T).amax() if T.shape[0] else T.sum(dtype=torch.float64)


def frobenius(T: Tensor) -> Tensor:
    r"""The Frobenius norm, :math:`\sqrt{\sum_{ri} T_{ri}^2}`.

    Args:
        T: A tensor of any shape and floating dtype.

    Returns:
        float64, 0-d.

    Example:
        >>> frobenius(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).item()
        5.0
    """
    norm: Tensor = torch.linalg.vector_norm(T, dtype=torch.float64)
    return norm
