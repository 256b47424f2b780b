"""Runs as people read them: tables on the terminal, and one self-contained page."""
