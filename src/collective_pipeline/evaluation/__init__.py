"""What the runs say: comparison, figures and report, which start from tables of finished runs; and predictions."""
