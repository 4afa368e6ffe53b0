"""`jadam.step`: the optimizer step in one pass over memory."""
