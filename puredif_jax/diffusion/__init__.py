"""Forward processes, what networks predict, and samplers."""
