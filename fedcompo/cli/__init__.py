"""The `fedcompo` command."""
