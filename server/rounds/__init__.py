"""Rounds in which clients train inside their sum (IEL)."""
