"""`loraplex chat`: a conversation in a terminal."""
