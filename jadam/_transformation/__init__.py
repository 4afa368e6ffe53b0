"""Build Optax transformations from update rules for one array."""
