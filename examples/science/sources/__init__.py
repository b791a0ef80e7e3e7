"""Where the six domains' subjects come from: one module a domain."""
