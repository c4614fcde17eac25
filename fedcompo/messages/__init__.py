"""The protocol: every request and every answer as a value, and how they travel.

``requests`` and ``answers`` are the messages, ``body`` turns them into tensors and a manifest,
``records`` packs these for Flower, ``wire`` writes tensors in fewer bits.
"""
