"""How the paper is made of it: scales, tables, figures, notebooks."""
