"""Diffusion: forward noising, noise prediction and the reverse loops, on the trunk of ``unet``."""
