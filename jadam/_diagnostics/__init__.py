"""What an optimizer's state holds and what Adam is doing."""
