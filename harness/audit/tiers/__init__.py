"""Tiers of repeatability: `evidence` gathers what was signed, `rules` decides, `text` tells."""
