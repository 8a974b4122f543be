"""Contrastive Generative Exploration: texts that show what a fine-tune has newly learnt, and what they tell."""
