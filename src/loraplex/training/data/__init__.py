"""From training files to padded batches of token ids."""
