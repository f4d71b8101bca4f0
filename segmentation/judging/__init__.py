"""How good a segmentation is: metrics, held-out evaluation, the report."""
