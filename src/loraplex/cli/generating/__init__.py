"""`loraplex generate`: rows in, answers out."""
