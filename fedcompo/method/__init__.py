"""The method, in five files to read in this order: task_vector, deltas, fisher, penalties, pool."""
