"""Grids of trainings that are compared in one table."""
