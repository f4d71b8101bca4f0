"""The plugin of napari: a file for each of its widgets. Only napari imports it, by napari.yaml."""
