"""Models for others: a selection of task vectors as a folder with its card, or as an adapter."""
