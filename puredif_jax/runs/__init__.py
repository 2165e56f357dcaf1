"""Run folders, devices, configurations and what people see."""
