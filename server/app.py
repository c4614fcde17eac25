"""The ServerApp: leaves the run to :mod:`server.work`, which is loaded when it starts.

While Flower loads an app, nothing else of a simulation can go on; Ray starts beside the run.
"""

from __future__ import annotations

from importlib import import_module

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Do what the settings say; see :func:`server.work.run`."""
    import_module("server.work").run(grid, context)
