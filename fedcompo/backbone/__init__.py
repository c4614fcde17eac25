"""The pre-trained backbone: loading it, its weights, its pixels, its first-order expansion."""
