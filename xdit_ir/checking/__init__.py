"""Is the parallel program equal to the model, and if not, where does it begin to differ?"""
