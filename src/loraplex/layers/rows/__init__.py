"""Which tokens of a call are which row's."""
