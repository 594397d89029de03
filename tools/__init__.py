"""Command line and demonstrations."""
