"""Saving and restoring everything that a step depends on, without pickle. Needs no trainer."""
