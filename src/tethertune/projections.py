r"""Projections of a displacement T = W - W0, given as (rows, columns), onto the balls of the two norms.

These are the definitions. What runs after every optimiser step is in :mod:`tethertune.kernels`, tested against them;
that is also where the result is made to hold exactly in the dtype that the weights are stored in.

A row that holds a NaN or an infinity is returned as it is.
"""

import torch
from torch import Tensor

from tethertune import norms

__all__ = ["frobenius", "l1_rows", "l1_rows_euclidean"]


def l1_rows(T: Tensor, radius: float | Tensor) -> Tensor:
    r"""Scale every row whose l1 norm exceeds the radius back to it (the paper's :math:`\pi_\infty`, Section 4.1.2).

    .. math:: \pi(T)_r = T_r \cdot \min\left(1, \gamma / \|T_r\|_1\right)

    It keeps the direction of a row and its zeros, and attains the l1 distance to the ball, but it is not the Euclidean
    projection and it is not nonexpansive (Thele 1974: its l1 Lipschitz constant is 2).

    Args:
        T: Displacement, (rows, columns).
        radius: The largest l1 norm of a row, >= 0; one number, or one a row with shape (rows,).

    Returns:
        A new tensor of the shape and dtype of ``T``.

    Example:
        >>> l1_rows(torch.tensor([[3.0, -1.0], [1.0, 0.5]]), 2.0).tolist()
        [[1.5, -0.5], [1.0, 0.5]]
    """
    sums = norms.row_sums(T)
    outside = (sums > radius) & sums.isfinite()
    scale = torch.where(outside, radius / sums, 1.0)
    return torch.where(outside.unsqueeze(1), T * scale.to(T.dtype).unsqueeze(1), T)


def l1_rows_euclidean(T: Tensor, radius: float | Tensor) -> Tensor:
    r"""Project every row onto the l1 ball in the Euclidean sense, by sorting (Duchi et al. 2008, Figure 1).

    .. math:: \pi(T)_{ri} = \operatorname{sign}(T_{ri}) \max(|T_{ri}| - \tau_r, 0)

    with :math:`\tau_r` such that the row's l1 norm is the radius. It sets the small entries of a row to zero.

    Args:
        T: Displacement, (rows, columns).
        radius: The largest l1 norm of a row, >= 0; one number, or one a row with shape (rows,).

    Returns:
        A new tensor of the shape and dtype of ``T``.

    Example:
        >>> l1_rows_euclidean(torch.tensor([[3.0, -1.0], [1.0, 0.5]]), 2.0).tolist()
        [[2.0, 0.0], [1.0, 0.5]]
    """
    sums = norms.row_sums(T)
    outside = (sums > radius) & sums.isfinite()
    if not T.shape[1]:
        return T.clone()
    gamma = torch.as_tensor(radius, dtype=torch.float64, device=T.device).expand_as(sums).unsqueeze(1)
    size = T.double().abs()
    largest_first = size.sort(dim=1, descending=True).values
    excess = largest_first.cumsum(dim=1) - gamma
    count = torch.arange(1, T.shape[1] + 1, dtype=torch.float64, device=T.device)
    kept = (largest_first * count > excess).sum(dim=1, keepdim=True).clamp_(min=1)
    tau = excess.gather(1, kept - 1) / kept
    shrunk = (T.sign() * (size - tau).clamp_(min=0)).to(T.dtype)
    return torch.where(outside.unsqueeze(1), shrunk, T)


def frobenius(T: Tensor, radius: float | Tensor) -> Tensor:
    r"""Scale the whole displacement back to the Frobenius ball: the exact Euclidean projection (Section 4.1.1).

    .. math:: \pi_2(T) = T \cdot \min\left(1, \gamma / \|T\|_F\right)

    Args:
        T: Displacement, of any shape.
        radius: The largest Frobenius norm, >= 0.

    Returns:
        A new tensor of the shape and dtype of ``T``.

    Example:
        >>> frobenius(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 2.5).tolist()
        [[1.5, 0.0], [0.0, 2.0]]
    """
    norm = norms.frobenius(T)
    outside = (norm > radius) & norm.isfinite()
    return torch.where(outside, T * torch.where(outside, radius / norm, 1.0).to(T.dtype), T)
