"""Requests and answers: who is asked, who answered, at what cost, who was left out."""
