"""Who and how much: a row's choice, and the plan of one forward pass."""
