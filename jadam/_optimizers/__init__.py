"""Adam and its relatives: the formula first, then the public functions."""
