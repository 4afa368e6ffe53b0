"""`jadam.step`: one pass over memory, by a kernel where there is one."""
