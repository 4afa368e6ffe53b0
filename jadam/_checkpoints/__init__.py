"""Saved states: other formats, and checksums."""
