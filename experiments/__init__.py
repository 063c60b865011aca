"""What is measured: python -m experiments.NAME."""
