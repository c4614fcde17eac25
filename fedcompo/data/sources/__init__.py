"""The sources of data, a file for each kind: what becomes a catalogue of images or texts.

:mod:`fedcompo.data.sources.kinds` tells them apart. What several share has a file of its own:
tables and their columns, labels, and the words for training, test and validation.
"""
