"""An OpenAI-compatible HTTP API for one base model and its adapters, for many tenants (docs/serving.md)."""
