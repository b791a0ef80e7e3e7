"""Links and mixtures inside vLLM (docs/vllm.md). The only package that imports vllm."""
