"""Texts -> rows in the caller's order."""
