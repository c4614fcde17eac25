"""What a run is asked to do: settings, their choices, their checks; no torch."""
