"""Kernels for attention and fused operators, and how they are chosen."""
