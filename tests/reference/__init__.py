"""Independent float64 implementations in NumPy, sharing no code.

Nothing here imports the package under test; the formulas are written out from
per-example Jacobians, as plainly as possible and without regard to cost.
"""
