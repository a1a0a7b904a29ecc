"""Which training samples a model is most sensitive to: predictions of every twin, ranked, as a table and a page."""
