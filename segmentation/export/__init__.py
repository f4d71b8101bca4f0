"""Trained models as files that other programs run: the graph, and the zoo's package of it."""
