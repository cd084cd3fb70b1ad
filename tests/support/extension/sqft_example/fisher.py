"""A sparsifier that needs gradients: what a weight costs the loss, to second order, by the diagonal of the Fisher."""

from sqft.calibration.statistics import Gradient
from sqft.sparsity.method import Pruned, sparsifier


@sparsifier(needs=Gradient, paper="arXiv 2203.07259, eq. 6")
def fisher(w_OI, squares_OI, pattern):
    return Pruned(pattern.kept(w_OI.float().square() * squares_OI))
