"""Results for people: tables on the terminal and a picture; no torch."""
