"""A method that vLLM's workers get: `collective_rpc("loraplex_scalings", args=(request_id,))`."""

from typing import Any

EXTENSION = "loraplex.vllm_plugin.worker_extension.ScalingsExtension"


class ScalingsExtension:
    """vLLM makes its worker class a subclass of this one (`worker_extension_cls`)."""

    model_runner: Any

    def loraplex_scalings(self, request_id: str) -> list[dict[str, Any]]:
        """What mixtures predicted for a request that asked for it; empty if there is nothing. Each is given once."""
        scaling_pass = getattr(self.model_runner, "loraplex_scaling_pass", None)
        return [] if scaling_pass is None else scaling_pass.log.take(request_id)
