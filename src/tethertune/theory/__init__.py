"""The paper's bounds, what is proven instead, and the norms of linear maps that both are made of."""

from tethertune.theory import calculus, certificate, comparators, printed
from tethertune.theory.bounds import Bound, Layer
from tethertune.theory.operators import OperatorNorms, operator_norms

__all__ = [
    "Bound",
    "Layer",
    "OperatorNorms",
    "calculus",
    "certificate",
    "comparators",
    "operator_norms",
    "printed",
]
