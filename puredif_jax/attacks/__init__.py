"""Backdoors as rows of one formula, their images and the poisoned training."""
