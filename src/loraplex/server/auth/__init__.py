"""Who may do what: API keys, the names and folders they reach, and their rate limits."""
