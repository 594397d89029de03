"""Decoders and encoders beside the denoisers: one module for images, videos, sound and text each, all as data."""
