"""One rank of a parallel program in this process, and the module around it."""
