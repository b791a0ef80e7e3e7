"""`GET /v1/loraplex/scalings/{request_id}`, and attention/{request_id}, in vLLM's OpenAI server.

vLLM wants `VLLM_PLUGINS` to name this.
"""

from typing import Any

from fastapi import FastAPI, HTTPException


class ScalingsEndpoint:
    """An endpoint plugin of vLLM's (`vllm.endpoint_plugins`)."""

    name = "loraplex"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""

        @app.get("/v1/loraplex/scalings/{request_id}")
        async def scalings(request_id: str) -> dict[str, Any]:
            """The scalings of a finished request that asked for them with vllm_xargs={"loraplex_scalings": 1}."""
            return await _fetched(app, "loraplex_scalings", request_id)

        @app.get("/v1/loraplex/attention/{request_id}")
        async def attention(request_id: str) -> dict[str, Any]:
            """The captured attention of a finished request that asked for it with vllm_xargs, loraplex_capture."""
            return await _fetched(app, "loraplex_attention", request_id)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine, which the route asks."""
        state.loraplex_engine = engine_client


async def _fetched(app: FastAPI, method: str, request_id: str) -> dict[str, Any]:
    """What the first worker has for a request; 404 if there is nothing."""
    engine = getattr(app.state, "loraplex_engine", None)
    if engine is None:
        raise HTTPException(503, "this server has no engine")
    answers = await engine.collective_rpc(method, args=(request_id,))
    if not answers or not answers[0]:
        raise HTTPException(
            404, f"there is nothing of {request_id!r}: not asked for in its vllm_xargs, or fetched already."
        )
    return {"id": request_id, "requests": answers[0]}
