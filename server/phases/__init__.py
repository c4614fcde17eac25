"""The phases of a run: who takes part, the Fisher, training, composing, choosing λ, measuring."""
