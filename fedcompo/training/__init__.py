"""What a client computes from its images: head, Fisher diagonal, task vector, accuracy.

The server uses it for a reference Fisher, and for the Fisher that anchors each client; an audit
trains shadow models with it.
"""
