"""What an engine compares when it starts: its packed passes against the base model's own."""
