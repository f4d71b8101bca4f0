"""Stable Diffusion's formats: its pipelines, autoencoder and CLIP, read, run and written."""
