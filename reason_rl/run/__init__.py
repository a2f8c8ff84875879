"""A run: its recipe, its folder, and the loop over its stages."""
