"""How good a model is: errors by noise level, distances to real images, copies, the report."""
