"""The registry as a service: publish, fetch, compose and leave over gRPC, with mutual TLS."""
