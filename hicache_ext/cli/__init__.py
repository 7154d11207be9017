"""Command line of hicache-ext. Commands live in modules of their own; nothing is imported here."""
