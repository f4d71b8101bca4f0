"""Images with masks: found, read, encoded as classes, weighted, augmented, generated."""
