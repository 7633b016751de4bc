"""The two norms that distances are measured in, of a matrix given as (rows, columns).

Both are computed in float64 whatever the dtype of the matrix: a float32 ``torch.linalg.vector_norm`` of a large layer
is wrong in the fourth digit, which no guarantee can stand on.
"""

import torch
from torch import Tensor

__all__ = ["frobenius", "mars", "row_sums"]


def row_sums(T: Tensor) -> Tensor:
    r"""The l1 norm of each row, :math:`\sum_i |T_{ri}|`.

    Args:
        T: A matrix (rows, columns) of any floating dtype.

    Returns:
        float64, shape (rows,).
    """
    return T.abs().sum(dim=1, dtype=torch.float64)


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
