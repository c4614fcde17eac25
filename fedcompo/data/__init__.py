"""The images of one client: from a named data set, folders, arrays or text to train and test."""
