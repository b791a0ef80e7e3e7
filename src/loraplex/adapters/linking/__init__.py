"""One adapter made of several, with weights, by the formulas of PEFT's `add_weighted_adapter`."""
