"""The results folder: points written whole or not at all, their provenance, and the frames read back."""
