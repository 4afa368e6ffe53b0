"""From a rule for one array to an Optax transformation over a tree."""
