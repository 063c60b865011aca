"""Rewards, a file each, and what they share in common.py."""
