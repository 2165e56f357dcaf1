"""Trigger inversion, what it yields, and the verdict on a model."""
