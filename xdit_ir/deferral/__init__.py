"""Tensors that stand for results that are not there yet."""
