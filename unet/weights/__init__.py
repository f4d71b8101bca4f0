"""Weights as files: model folders, pickles that are safe to read, other projects' layouts."""
