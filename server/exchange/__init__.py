"""The conversation with the clients: nodes, requests, answers and their checks, the books."""
