"""Diffusion transformers written from their papers in plain PyTorch, in the styles that research code has.

They import nothing from the compiler and nothing from diffusers: to it they are other people's models.
"""
