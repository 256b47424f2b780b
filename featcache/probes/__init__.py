"""Stage 2: grids of probes trained together on a store. Never needs a backbone."""
