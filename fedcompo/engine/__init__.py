"""A simulation on Flower's real engine, started and ended by us; no torch."""
