"""The client: it trains and measures where the data is, and sends what its caps allow."""
