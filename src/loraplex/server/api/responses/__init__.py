"""/v1/responses: its items as a chat's turns, and an answer as items and events."""
