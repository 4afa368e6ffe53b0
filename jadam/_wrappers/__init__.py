"""What goes around an optimizer: clipping, exact bf16 weights, exceptions by path, averages."""
