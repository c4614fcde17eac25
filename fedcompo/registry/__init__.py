"""The pool on disk: add, remove, compose, verify; a journal and signed records."""
