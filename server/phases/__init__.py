"""The phases of a one-shot run: who takes part, the Fisher, training, composing."""
