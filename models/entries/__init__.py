"""One module per model family, each with a mapping `ENTRIES` from a name to an `Entry`: data only."""
