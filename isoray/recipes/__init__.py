"""Recipes: one file per system, each read from top to bottom as its paper does."""
