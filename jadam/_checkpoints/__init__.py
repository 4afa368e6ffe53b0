"""Conversion and checksums of saved states."""
