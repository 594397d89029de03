"""The one call: a module or a pipeline in, its parallel drop-in out."""
