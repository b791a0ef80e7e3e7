"""What a mixture predicted: each row's scalings, their log, and pictures of them."""
