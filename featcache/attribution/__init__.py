"""Stage 3: maps that explain a probe's decisions, and how well they localise objects."""
