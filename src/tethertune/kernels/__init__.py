"""The fast ways to do what :mod:`tethertune.projections` defines, exact in the dtype that the weights are stored in."""
