"""What can be measured of a registry's model: accuracy by client, and whether it forgets."""
