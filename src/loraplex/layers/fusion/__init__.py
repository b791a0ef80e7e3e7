"""Which formula a module of the base model computes, found by what it computes and not by its name."""
