"""How often a backdoor fires, and how good images are."""
