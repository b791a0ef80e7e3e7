"""The Tinker API over HTTP: what its SDK sends and gets, on loraplex's own training loop and engine."""
