"""`GET /v1/loraplex/scalings/{request_id}` in vLLM's OpenAI server; vLLM wants `VLLM_PLUGINS` to name it."""

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
            engine = getattr(app.state, "loraplex_engine", None)
            if engine is None:
                raise HTTPException(503, "this server has no engine")
            answers = await engine.collective_rpc("loraplex_scalings", args=(request_id,))
            if not answers or not answers[0]:
                raise HTTPException(
                    404,
                    f"there are no scalings of {request_id!r}: no mixture, not asked for with vllm_xargs "
                    '{"loraplex_scalings": 1}, or fetched already.',
                )
            return {"id": request_id, "requests": answers[0]}

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine, which the route asks."""
        state.loraplex_engine = engine_client
