"""The paper's bounds, what is proven instead, and the norms of linear maps that both are made of."""

from tethertune.theory import calculus, certificate, comparators, grid, printed
from tethertune.theory.bounds import Bound, Layer
from tethertune.theory.certify import Certificate, LayerReport, certify
from tethertune.theory.checklist import Check, Facts
from tethertune.theory.graph import trace
from tethertune.theory.losses import ClippedCrossEntropy, CrossEntropy, Ramp
from tethertune.theory.measurements import LayerMeasurement, measurements
from tethertune.theory.nodes import Network, NotCoveredError
from tethertune.theory.operators import OperatorNorms, operator_norms

__all__ = [
    "Bound",
    "Certificate",
    "Check",
    "ClippedCrossEntropy",
    "CrossEntropy",
    "Facts",
    "Layer",
    "LayerMeasurement",
    "LayerReport",
    "Network",
    "NotCoveredError",
    "OperatorNorms",
    "Ramp",
    "calculus",
    "certificate",
    "certify",
    "comparators",
    "grid",
    "measurements",
    "operator_norms",
    "printed",
    "trace",
]
