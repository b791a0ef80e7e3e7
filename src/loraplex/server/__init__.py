"""An OpenAI-compatible HTTP API for one base model and its adapters, for many tenants (docs/serving.md)."""

from loraplex.extras import require_extra

require_extra("server", "the server")
