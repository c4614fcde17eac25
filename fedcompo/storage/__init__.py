"""Tensors and files on disk: atomic writes, and safetensors as a whole or tensor by tensor."""
