"""The engine: which probes train together, how they train, and what trained probes predict."""
