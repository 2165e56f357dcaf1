"""What a run does: training, measuring, amplification, audits, scans, sweeps."""
