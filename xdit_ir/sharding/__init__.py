"""One analysis: layouts of every value by the rules, what they cost, and each rank's program."""
