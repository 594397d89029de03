"""Every rank in one process, in lockstep."""
