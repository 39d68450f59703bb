"""Networks, weights and training: all that needs torch."""
