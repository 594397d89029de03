"""Reflection: what Python objects hold, as far as a trace, or a port, must know it."""
