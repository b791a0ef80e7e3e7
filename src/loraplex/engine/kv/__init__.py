"""Keys and values in blocks: the block pool, the prefix cache, and what a token sees."""
