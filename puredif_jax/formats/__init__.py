"""Models of others: where they lie, and what their files say."""
