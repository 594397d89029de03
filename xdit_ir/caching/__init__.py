"""Steps that reuse a part of an earlier one: which part, when, and what is kept for it."""
