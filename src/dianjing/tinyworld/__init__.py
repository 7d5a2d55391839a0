"""A small drawn world with known answers: the data, base models and proof of the demo."""
