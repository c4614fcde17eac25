"""Files: atomic writes, and tensors with a manifest, as a whole or tensor by tensor."""
