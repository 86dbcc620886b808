"""How good it is, in two and three dimensions."""
