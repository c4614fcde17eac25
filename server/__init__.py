"""The coordinator of a run on Flower. It asks the clients, composes one model, and holds no data.

``app`` is the entry point. ``exchange`` is the conversation with the clients, ``phases`` what a run
goes through once, ``rounds`` what it repeats; ``strategy``, ``sequential``, ``averaging`` and
``unlearning`` put them together for the four kinds of runs.
"""
