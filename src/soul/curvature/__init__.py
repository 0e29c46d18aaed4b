"""Curvature, as parts that compose: estimators of the diagonal, Kronecker factors, products, inverses."""
