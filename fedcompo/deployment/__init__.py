"""Writes what a federation on separate machines needs: one folder for the server, one a client."""
