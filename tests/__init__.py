"""Tests import what they share by its full name, ``from tests.engine.tiny_data import ...``."""
