"""Programs that make what is committed in data/; no notebook and no test of the numbers needs them."""
