"""Networks that predict noise, and their memory."""
