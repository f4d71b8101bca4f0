"""Segmentation of images with the U-Net: data, training, metrics, prediction."""
