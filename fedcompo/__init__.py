"""Federated fine-tuning of vision transformers into task vectors that add up, and come apart.

Each client fine-tunes a shared pre-trained backbone into a task vector; their sum is one model that
knows all tasks. Read ``task_vector``, ``deltas``, ``fisher``, ``penalties`` and ``pool`` in this
order, and you know the method.
"""
