"""Which degrees to take: estimates of time and memory, machines as data, plans."""
