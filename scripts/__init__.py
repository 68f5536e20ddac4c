"""Programs that make what is committed in data/; no notebook needs them."""
