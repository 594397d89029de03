"""How tensors travel between ranks: groups, collectives, copy engines, handshakes."""
