"""What runs at the coordinator, which holds no data."""
