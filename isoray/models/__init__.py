"""Models: load, create, adapt, save."""
