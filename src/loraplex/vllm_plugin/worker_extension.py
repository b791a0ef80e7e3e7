"""What a worker can be asked for: `llm.collective_rpc("loraplex_scalings", args=("0",))`."""

from typing import Any

EXTENSION = "loraplex.vllm_plugin.worker_extension.WorkerExtension"


class WorkerExtension:
    """vLLM makes its worker class a subclass of this one (`worker_extension_cls`)."""

    model_runner: Any

    def loraplex_scalings(self, request_id: str) -> list[dict[str, Any]]:
        """What mixtures predicted for a request that asked for it; empty if there is nothing. Each is given once."""
        scaling_pass = getattr(self.model_runner, "loraplex_scaling_pass", None)
        return [] if scaling_pass is None else scaling_pass.log.take(request_id)

    def loraplex_attention(self, request_id: str) -> list[dict[str, Any]]:
        """What a request captured of attention; empty if there is nothing. Each is given once."""
        residual_pass = getattr(self.model_runner, "loraplex_residual_pass", None)
        return [] if residual_pass is None else residual_pass.log.take(request_id)
