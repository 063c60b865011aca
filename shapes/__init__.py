"""The embedded world: scenes, captions, a judge, and how its models were made."""
