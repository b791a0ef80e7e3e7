"""Mixture-of-experts layers of the base model, adapted."""
