"""Attention over packed segments that share prefixes."""
