"""How moments are stored between steps: float32, bfloat16, int8."""
