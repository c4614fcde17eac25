"""Loads what a simulated client needs before its first request, while the server loads.

Ray's processes import this as they start (``RAY_preload_python_modules``).
"""

import os
from importlib import import_module

# As Ray says itself to a process of one CPU, but only with its first request: bits depend on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import_module("clients.work")
