"""Training: one loop for every arm, in a bare script as well as in a pipeline."""
