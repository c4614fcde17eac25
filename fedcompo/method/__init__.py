"""The method, in five files to read in this order: task_vector, deltas, fisher, penalties, pool.

Beside them: the classifiers (heads), the statistics of features that a joint head is fitted to
(features), and all of it together as one client's contribution, in memory and on disk.
"""
