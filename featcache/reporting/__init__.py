"""Runs for people: tables on the terminal, and one self-contained page."""
