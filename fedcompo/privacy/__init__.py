"""What leaves a client, made less telling: noise, and smaller forms of the Fisher diagonal."""
