"""The CPU's kernel."""
