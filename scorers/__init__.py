"""Rewards, a file each; what all of them are made of is common.py."""
