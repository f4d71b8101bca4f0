"""The images to learn from: where they come from, as tensors, and those that we draw."""
