"""The measurements: each row is a piece of work, which each side does with different code."""

from benchmarks import diffusion_rows, engine_rows, scaling_rows, segmentation_rows

ROWS = segmentation_rows.ROWS | diffusion_rows.ROWS | engine_rows.ROWS | scaling_rows.ROWS
