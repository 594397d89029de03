"""Small plain modules, each with one thing that research code does and a compiler stumbles over.

They are no denoisers of anybody: what they share stands in `parts`, what is peculiar in forty lines at most. `data` has
what makes them by name; `models.load("kind-shifted-windows:tiny")` makes one.
"""
